"""From a detector and data to a checked artefact and a report, step by step; a stopped run goes on where it was."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from norton_deploy.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from norton_deploy.compression.fit_plan import fit_plan
from norton_deploy.compression.lowering import multiply_out
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.coco_index import annotation_file
from norton_deploy.data.dataset_check import check_dataset
from norton_deploy.data.synthetic import write_dataset
from norton_deploy.deployment import making, notes, source_model
from norton_deploy.deployment.estimates import Estimates
from norton_deploy.deployment.making import tool
from norton_deploy.deployment.measurement import (
    DENSE,
    SMALL,
    model_record,
    read_results,
    score_file,
    speedup_of,
    time_in_turn,
)
from norton_deploy.deployment.request import DeployRequest, EngineTarget
from norton_deploy.deployment.steps import LOCK, ProgressLines, Steps, check_run_folder, to_stderr
from norton_deploy.errors import UserError
from norton_deploy.evaluation.coco_metrics import primary_iou_type
from norton_deploy.export.artefact import write_artefact
from norton_deploy.export.tensorrt_build import target_commands
from norton_deploy.files import sha256_of
from norton_deploy.folder_lock import held
from norton_deploy.inference.loading import load_predictor
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.reporting.compared_images import compare_images
from norton_deploy.reporting.deployment import Deployment
from norton_deploy.reporting.deployment_report import NEXT_TO_NOTHING, misses, write_report
from norton_deploy.reporting.detector_table import MODEL_NAMES
from norton_deploy.reporting.provenance import provenance
from norton_deploy.search.latency_budget import Workload
from norton_deploy.search.plan_search import check_budget
from norton_deploy.structures import Task
from norton_deploy.training.run_folder import RunFolder
from norton_deploy.training.run_log import read_log

DRAWN_IMAGES = (64, 32)
"""Training and held-out scenes that are drawn for the packaged detector."""


def deploy(
    request: DeployRequest,
    *,
    command: str = "norton_deploy.deploy(request)",
    report: Callable[[str], None] = to_stderr,
) -> Deployment:
    """Do all steps, or those that are left, and write report.html, report.md and report.json into `request.out`.

    Args:
        request: what and how.
        command: the command line, for the report and the checkpoints' lineage.
        report: gets every message for people.

    Raises:
        UserError: the model, the data or a setting is wrong, the data have errors, another process deploys into this
            folder, or the graph does not detect what the model detects.
    """
    with ExitStack() as holding:
        return _Run(request, command, report, holding).deployment()


class _Run:
    """One deployment: the files and figures that the steps hand on."""

    def __init__(self, request: DeployRequest, command: str, report: Callable[[str], None], holding: ExitStack) -> None:
        self.request, self.command, self.report = request, command, report
        self.out, self.target, self.effort = request.out, EngineTarget.parse(request.target), request.effort
        self.notes: list[str] = []
        self.file = source_model.source_file(request)
        opened = source_model.open_source(request, self.file)
        self.task, self.categories = cast(Task, opened.header.task), opened.header.categories
        self.compressed = opened.header.plan is not None
        if self.compressed and request.plan is not None:
            raise UserError(f"{self.file}: is compressed already; leave --plan out, or give its dense original")
        if request.plan is not None:
            fit_plan(opened.model, CompressionPlan.load(request.plan))
        identity = request.identity() | {"model_sha256": sha256_of(self.file)}
        if request.data is not None:
            identity["annotations"] = sha256_of(annotation_file(request.data, "val", self.task))
        finetuned = bool(self.effort.finetune_steps) and not self.compressed
        check_run_folder(self.out)
        holding.enter_context(held(self.out / LOCK, "deploys here"))
        self.steps = Steps(self.out, identity, count=self._count(finetuned), report=report)
        self.progress = ProgressLines(report)
        self.finetuned = finetuned
        self.data = request.data or self._drawn_data()
        self._check_data()
        self.model = self._import(opened)
        self.image_size = source_model.own_image_size(request, self.model)
        if not self.compressed and request.plan is None:
            check_budget(
                load_checkpoint(self.model).model, making.plan_request(request, self.data, self.image_size, False)
            )
        self.estimates = Estimates.of(load_checkpoint(self.model), self.image_size, self.data)
        self.limit = self.effort.images
        self.dataset = CocoDetection(self.data, "val", self.task, categories=self.categories)
        self.images = len(self.dataset.image_ids[: self.limit])

    def deployment(self) -> Deployment:
        """Every step after the first ones, and the report."""
        dense = self._dense()
        dense_score = self._score("dense", dense, "AP of the dense model", 1.0)
        if 0 <= dense_score["scores"][primary_iou_type(self.task)]["metrics"]["AP"] < NEXT_TO_NOTHING:
            self.notes.append(notes.BLIND.format(names=", ".join(self.categories.names)))
            self.report(f"    {self.notes[-1]}")
        self._time("time-dense", "latency of the dense model on the target engine", {DENSE: dense}, 1.0)
        found, small = (None, self.model) if self.compressed else self._compressed(self.model)
        speedup = 1.0 if self.compressed else self.request.speedup
        others = []
        if not self.compressed and self.target.graph is not None:
            score = self._score("small-checkpoint", small, "AP of the small model", 2.5 / speedup)
            others.append(self._record("NORTON before export", small, score, None, "", load_checkpoint(small).model))
        parity, artefact, run = self._export(small)
        small_score = self._score("artefact", run, "AP of the very artefact", 1 / speedup)
        timing = self._time("time", "latency, dense and artefact in turn", {DENSE: dense, SMALL: run}, 1 + 1 / speedup)
        compared = compare_images(
            self.out, self.dataset, read_results(self._results("dense")), read_results(self._results("artefact")),
            limit=self.limit,
        )  # fmt: skip
        made = Deployment(
            title=f"{MODEL_NAMES[self.task]} for {self.target.name}: {self.file.stem}",
            asked=None if self.compressed or self.request.plan is not None else self.request.speedup,
            task=self.task,
            dense=self._record(self.dense_name, dense, dense_score, timing, DENSE, self.dense_model),
            small=self._record("NORTON", run, small_score, timing, SMALL, load_checkpoint(small).model),
            provenance=provenance() | {"command": self.command},
            others=tuple(others),
            data=self.data.resolve().name,
            images=self.images,
            speedup=speedup_of(timing),
            artefact=artefact.relative_to(self.out).as_posix(),
            budget="" if found is None else found.get("budget", ""),
            plan=found if found and "frontier" in found else None,
            parity=parity,
            compared=compared,
            training=read_log(RunFolder(self.out / "finetune").log) if self.finetuned else (),
            steps=self.steps.records,
            notes=tuple(self.notes),
        )
        if misses(made):
            made = replace(made, notes=(notes.why_missed(self.request, found, made.speedup), *made.notes))
        write_report(self.out, made)
        return made

    def _count(self, finetuned: bool) -> int:
        """Of all steps."""
        drawn, imported = self.request.data is None, not self._used_as_it_is()
        compressing = 0 if self.compressed else 1 + (self.request.plan is None) + (self.target.graph is not None)
        graphs = 0 if self.target.graph is None else 2
        engines = (self.target.engine is not None) + self.target.runs_here
        return 5 + drawn + imported + compressing + finetuned + graphs + engines

    def _used_as_it_is(self) -> bool:
        return source_model.is_checkpoint(self.file) and self.request.image_size is None

    def _drawn_data(self) -> Path:
        self.notes.append(source_model.PACKAGED)
        train, val = DRAWN_IMAGES
        sizes = {"train": train, "val": val, "seed": 1, "min_size": 160, "max_size": 224}
        data = self.out / "data"

        def draw() -> dict[str, Any]:
            write_dataset(data, train, val, seed=1, image_sizes=(160, 224), workers=1)
            return {}

        products = [annotation_file(data, "val", "box")]
        self.steps.run("draw", "draw scenes", tool("make_synthetic", out=data, **sizes), draw, seconds=10,
                       products=products)  # fmt: skip
        return data

    def _check_data(self) -> None:
        def check() -> dict[str, Any]:
            found = check_dataset(self.data, self.task)
            self.report("\n".join(f"    {line}" for line in found.lines()))
            found.require()
            return found.to_dict()

        command = tool("check_data", data=self.data, task=self.task)
        self.steps.run("check-data", "check the data", command, check, seconds=20)

    def _import(self, opened: Checkpoint) -> Path:
        """The checkpoint of the model for these images; the file itself where it is one."""
        if self._used_as_it_is():
            return self.file
        out, request = self.out / "model.safetensors", self.request
        command = source_model.import_command(request, self.file, annotation_file(self.data, "val", self.task), out)

        def save() -> dict[str, Any]:
            save_checkpoint(out, opened.model, opened.header.made_by(command, request.weights or self.file))
            return {}

        self.steps.run("import", "take the model in", command, save, seconds=10, products=[out])
        return out

    def _dense(self) -> Path:
        """The dense model as what runs on the target."""
        source, checkpoint, multiplied_out = load_checkpoint(self.model), self.model, False
        self.dense_model: nn.Module = source.model
        self.dense_name = DENSE
        if self.compressed:
            baseline, note = source_model.dense_of(self.request, source)
            self.notes.append(note)
            self.dense_name = source_model.UNFACTORED if baseline is None else DENSE
            checkpoint, multiplied_out = baseline or self.model, baseline is None
            self.dense_model = multiply_out(source.model) if baseline is None else load_checkpoint(baseline).model
        if self.request.quick:
            self.notes.append(notes.QUICK.format(images=self.images))
        if self.target.graph is None:
            return checkpoint
        graph = self._graph("dense", checkpoint, 1.0, multiplied_out=multiplied_out)[0]
        return self._engine("dense", graph)[1] if self.target.runs_here else graph

    def _graph(
        self, name: str, model: Path, share: float, *, multiplied_out: bool = False, artefact: Path | None = None
    ) -> tuple[Path, dict[str, Any]]:
        """A checkpoint's graph, beside it the artefact that is made of it, and its comparison with the model."""
        out, parity_images = self.out / f"{name}.onnx", self.effort.parity_images
        options = making.export_options(self.request, self.image_size, self.data, multiplied_out=multiplied_out)

        def export() -> dict[str, Any]:
            made = making.export_file(model, out, options, self.data, parity_images, self.report)
            if artefact is not None:
                write_artefact(artefact, out, overwrite=True)
            return made

        result = self.steps.run(
            f"export-{name}",
            f"export the {name} model and compare the graph with it, stage by stage",
            making.export_command(model, out, options, self.data, parity_images, artefact),
            export,
            seconds=self.estimates.export(parity_images, share),
            products=[out] if artefact is None else [out, artefact],
        )
        return out, result["parity"]

    def _compressed(self, dense: Path) -> tuple[dict[str, Any] | None, Path]:
        """Plan, compress, fine-tune: what is known about the plan, and the small checkpoint."""
        request, estimates, found = self.request, self.estimates, None
        if request.quick:
            self.notes.append(notes.quick_plan(request))
        plan = request.plan
        if plan is None:
            plan = self.out / "plan.yaml"
            sensitivity = plan.with_suffix(".sensitivity.json")
            search = making.plan_request(request, self.data, self.image_size, sensitivity.is_file())
            if self.target.engine is not None and not request.quick:
                self.notes.append(notes.BY_MACS.format(target=self.target.name))
            elif search.budget.startswith("speedup") and self.target.name == "torch":
                self.notes.append(notes.BY_ONNX_RUNTIME)
            target_plan, engine = plan, making.timed_engine(self.target, request.precision)
            found = self.steps.run(
                "plan", f"search a plan for {search.budget}", making.plan_command(dense, search, engine, plan),
                lambda: making.search_plan(dense, search, engine, target_plan, self.report, self.progress),
                seconds=estimates.plan(load_checkpoint(dense).model, search), products=[plan],
            )  # fmt: skip
        small, chosen = self.out / "compressed.safetensors", plan
        refit: dict[str, object] = {"choose": "angles"}
        if self.effort.refit_images:
            refit = {"refit": self.data / "train2017", "refit_images": self.effort.refit_images,
                     "refit_side": self.effort.refit_side}  # fmt: skip
        command = tool("compress", model=dense, plan=plan, out=small, seed=request.seed, **refit)
        self.steps.run(
            "compress", "compress the model and refit its layers", command,
            lambda: making.compress_file(dense, chosen, small, request, self.data, command, self.progress),
            seconds=estimates.compress(self.effort), products=[small],
        )  # fmt: skip
        if not self.finetuned:
            return found, small
        folder = RunFolder(self.out / "finetune")
        settings = making.finetune_settings(request, self.task, self.data, small, dense, folder.root)
        command = making.finetune_command(settings)
        self.steps.run(
            "finetune", f"fine-tune it for {settings.steps} steps, the dense model as teacher", command,
            lambda: making.finetune(settings, command, self.report),
            seconds=estimates.finetune(self.effort.finetune_steps, request.batch_size), products=[folder.last],
        )  # fmt: skip
        return found, folder.last

    def _export(self, small: Path) -> tuple[dict[str, Any] | None, Path, Path]:
        """The comparison with the model, the artefact, and the file that is measured on this machine."""
        if self.target.graph is None:
            return None, small, small
        share, folder = 1 / self.request.speedup, self.out / "artefact"
        if self.target.engine is None:
            _, parity = self._graph("small", small, share, artefact=folder)
            return parity, folder / "model.onnx", folder / "model.onnx"
        graph, parity = self._graph("small", small, share)
        built, _ = self._engine("small", graph, folder)
        artefact = folder / ("model.engine" if built["built"] else "model.onnx")
        if not built["built"]:
            own = target_commands(artefact.name, "model.engine", self.target.engine)[0]
            self.notes.append(notes.NOT_BUILT.format(reason=built["reason"], command=own))
        elif not built["ran"]:
            self.notes.append(notes.NOT_RUN)
            return parity, artefact, graph
        return parity, artefact, artefact

    def _engine(self, name: str, graph: Path, artefact: Path | None = None) -> tuple[dict[str, Any], Path]:
        """What came of a graph's engine (`build_engine_of`), and which of both is measured here."""
        target, engine = self.target, graph.with_suffix(".engine")

        def build() -> dict[str, Any]:
            built = making.build_engine_of(graph, engine, target, self.report)
            if artefact is not None:
                write_artefact(artefact, engine if built["built"] else graph, overwrite=True)
            return built

        built = self.steps.run(
            f"engine-{name}", f"build the {name} model's engine for {target.name}",
            tool("export_trt", onnx=graph, engine=target.engine, out=engine,
                 compute_capability=target.compute_capability, artefact=artefact),
            build, seconds=60, products=[] if artefact is None else [artefact],
        )  # fmt: skip
        return built, engine if built["ran"] else graph

    def _results(self, name: str) -> Path:
        return self.out / "results" / f"{name}.json"

    def _score(self, name: str, file: Path, title: str, share: float) -> dict[str, Any]:
        backend = self.target.backend if file.suffix == ".onnx" else None
        options = {"limit": self.limit, "backend": backend if backend == "openvino" else None}
        return self.steps.run(
            f"ap-{name}", f"{title}, {self.images} images",
            tool("eval_det", task=self.task, data=self.data, model=file, **options),
            lambda: score_file(file, self.data, self.task, self._results(name), backend=backend, limit=self.limit),
            seconds=self.estimates.evaluate(self.images, share), products=[self._results(name)],
        )  # fmt: skip

    def _time(self, name: str, title: str, files: dict[str, Path], share: float) -> dict[str, Any]:
        rounds = self.effort.rounds

        def measure() -> dict[str, Any]:
            predictors = {key: self._predictor(file) for key, file in files.items()}
            return time_in_turn(predictors, self.data, rounds)

        backend = {"backend": "openvino"} if self.target.backend == "openvino" else {}
        command = tool("latency", models=tuple(files.values()), data=self.data, rounds=rounds, **backend)
        return self.steps.run(name, title, command, measure, seconds=self.estimates.evaluate(rounds, share))

    def _predictor(self, file: Path) -> Any:
        return load_predictor(file, backend=self.target.backend if file.suffix == ".onnx" else None)

    def _record(self, name: str, file: Path, score: Any, timing: Any, timed_as: str, model: nn.Module) -> Any:
        counted = Workload.of(model, self.image_size).complexity(model)
        return model_record(name, file, self.out, score, timing, timed_as, macs=counted.macs, params=counted.params)
