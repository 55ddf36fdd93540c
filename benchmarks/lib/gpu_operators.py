"""Cells of benchmarks/gpu.py about parts: suppression, RoIAlign, masks, TopK, forms of a CPDBlock, compiled modules."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import batched_nms, roi_align

from benchmarks.lib.gpu_bench import Bench, Graph, Variant, arithmetic, event_ms, explain, spread, time_in_turn
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.lowering import Form, lower_block
from norton_deploy.export.static_boxes import DEFAULT_ITERATIONS, nms_unrolled, pairwise_iou
from norton_deploy.export.static_roi_align import StaticRoIAlign
from norton_deploy.inference.cuda_graph import capture
from norton_deploy.masks import MasksInBoxes
from norton_deploy.models.detectron2_layers import paste_subpixel

FORMS: tuple[Form, ...] = ("separable", "grouped", "dense")


class Traffic(TorchDispatchMode):
    """Bytes that the operators read and write, each operand of each operator once, views nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if not any(one.alias_info is not None and not one.alias_info.is_write for one in returns):
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
                if isinstance(tensor, Tensor):
                    size = tensor.numel() * tensor.element_size()
                    self.bytes += min(size, tensor.untyped_storage().nbytes())
        return result


def measure(bench: Bench, call: Callable[[], Any], *, static: bool = True) -> dict[str, Any]:
    """Time and bytes of a call, captured when it is `static`, else as it is on the host's clock; or the error."""
    try:
        with torch.no_grad(), arithmetic("fp32", search=True):
            with Traffic() as traffic:
                call()
            if static:
                graph, _ = capture(call, bench.device)
                times = event_ms(bench, graph.replay if graph is not None else call)
            else:
                times = time_in_turn(bench, {"": call}, 2 if bench.smoke else 15)[""]
    except Exception as error:
        return {"error": explain(error)}
    found: dict[str, Any] = {**spread(times), "captured": static and bench.on_gpu, "bytes": traffic.bytes}
    found["gb_per_s"] = traffic.bytes / found["median_ms"] / 1e6
    if "copy_gb_per_s" in bench.rates:
        found["share_of_copy"] = found["gb_per_s"] / bench.rates["copy_gb_per_s"]
    return found


def nms_blocked(
    boxes: Tensor,
    valid: Tensor,
    groups: Tensor | None,
    iou_threshold: float,
    iterations: int,
    *,
    block: int = 128,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """As `nms_unrolled`, in one pass over blocks of sorted boxes.

    Inside a block `iterations` steps on a small matrix; then one product lets its survivors suppress all later boxes.
    """
    over = suppresses(boxes, groups, iou_threshold).to(dtype)
    alive = valid.to(dtype)
    gone = torch.zeros_like(alive)
    unsettled = torch.zeros((), dtype=torch.int64, device=boxes.device)
    kept = []
    for begin in range(0, boxes.shape[-2], block):
        rows = slice(begin, begin + block)
        possible = alive[..., rows] * (gone[..., rows] < 0.5)
        inner = over[..., rows, rows]
        keep, previous = possible, possible
        for _ in range(iterations):
            previous = keep
            keep = possible * ((keep.unsqueeze(-2) @ inner).squeeze(-2) < 0.5)
        unsettled = unsettled + (keep != previous).sum()
        gone = gone + (keep.unsqueeze(-2) @ over[..., rows, :]).squeeze(-2)
        kept.append(keep)
    return torch.cat(kept, dim=-1) > 0.5, unsettled < 1


def suppresses(boxes: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    """bool [..., N, N]: the row's box is earlier, of the same group and overlaps the column's too much."""
    count = boxes.shape[-2]
    over = (pairwise_iou(boxes) > iou_threshold) & torch.ones(count, count, dtype=torch.bool, device=boxes.device).triu(
        1
    )
    return over if groups is None else over & (groups.unsqueeze(-1) == groups.unsqueeze(-2))


def operators(bench: Bench) -> dict[str, Any]:
    """Suppression, RoIAlign and TopK in several forms, captured, with the bytes that they move unfused."""
    results = bench.partial
    generator = torch.Generator().manual_seed(0)
    count = 64 if bench.smoke else 1000
    for name, sets, groups_count, threshold in (("rpn", 5, 1, 0.7), ("box head", 1, 90, 0.5)):
        low = torch.rand(sets, count, 2, generator=generator) * 600
        size = torch.rand(sets, count, 2, generator=generator) * 150 + 30
        boxes = torch.cat([low, low + size], -1).to(bench.device)
        valid = torch.ones(sets, count, dtype=torch.bool, device=bench.device)
        label = torch.randint(groups_count, (sets, count), generator=generator).to(bench.device)
        groups = None if groups_count == 1 else label
        scores = torch.arange(sets * count, 0, -1.0, device=bench.device)
        owner = torch.arange(sets, device=bench.device)[:, None] * groups_count + label
        given = (boxes, valid, groups, threshold)
        forms: dict[str, Callable[[], Any]] = {
            "unrolled": partial(nms_unrolled, *given, DEFAULT_ITERATIONS),
            "unrolled, fp16": partial(nms_unrolled, *given, DEFAULT_ITERATIONS, torch.float16),
            "blocks of 128, 8 steps": partial(nms_blocked, *given, 8),
            "blocks of 256, 8 steps": partial(nms_blocked, *given, 8, block=256),
            "overlaps alone": partial(suppresses, boxes, groups, threshold),
        }
        expected, _ = forms["unrolled"]()
        for form, call in forms.items():
            found = measure(bench, call)
            if form != "overlaps alone" and "error" not in found:
                keep, settled = call()
                found |= {"settled": bool(settled), "as_unrolled": bool((keep == expected).all())}
            results[f"nms {name}, {form}"] = found
        native = partial(batched_nms, boxes.flatten(0, 1), scores, owner.flatten(), threshold)
        results[f"nms {name}, torchvision's"] = measure(bench, native, static=False)
    results |= roi_forms(bench)
    side = 2_000 if bench.smoke else 120_000
    values = torch.rand(1, side, generator=generator).to(bench.device)

    def in_two() -> Tensor:
        parts = values.reshape(16, -1).topk(min(count, side // 16), dim=1).values
        return parts.reshape(1, -1).topk(count, dim=1).values

    results |= mask_forms(bench)
    results["topk in one"] = measure(bench, lambda: values.topk(count, dim=1))
    results["topk in two stages"] = measure(bench, in_two)
    return results


def mask_forms(bench: Bench) -> dict[str, Any]:
    """A frame's masks: pasted on the device (as bits, copied to the host), and pasted on the host."""
    generator = torch.Generator().manual_seed(0)
    height, width = bench.image_size
    low = torch.rand(bench.detections, 2, generator=generator) * 0.7 * torch.tensor([width, height])
    boxes = torch.cat([low, low + 20 + torch.rand(low.shape, generator=generator) * 0.25 * width], 1)
    masks = torch.rand(bench.detections, 28, 28, generator=generator)
    on_device = boxes.to(bench.device), masks.to(bench.device)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bench.device)

    def paste() -> Tensor:
        inside = paste_subpixel(on_device[1], on_device[0], bench.image_size) > 0.5
        return (inside.reshape(-1, 8) * powers).sum(1, dtype=torch.uint8)

    boxed = MasksInBoxes(masks.numpy(), boxes.numpy(), bench.image_size, "subpixel")
    results = {"masks pasted on the device": measure(bench, paste)}
    results["masks pasted on the device, to the host"] = measure(bench, lambda: paste().cpu(), static=False)
    for name, call in (
        ("masks pasted on the host", boxed.paste),
        ("masks' boxes on the host", lambda: [boxed.crop(index) for index in range(len(boxed))]),
    ):
        results[name] = spread(time_in_turn(bench, {"": call}, 2 if bench.smoke else 10)[""])
    return results


def roi_forms(bench: Bench) -> dict[str, Any]:
    """RoIAlign of the box head for the proposals of one frame."""
    results: dict[str, Any] = {}
    static = bench.static(Variant("box", "fast"))
    model = bench.model("box", "fast")
    with torch.no_grad(), arithmetic("fp32"):
        _, maps = static.features(static.preprocess(bench.frames(1)))
        proposals = static.rpn.select(*static.rpn.head(list(maps.values())))[0]
    pool: StaticRoIAlign = static.box_pool
    scales = pool.level_scale.tolist()
    for dtype in (torch.float16, torch.float32):
        typed = {name: value.to(dtype) for name, value in maps.items()}

        def gather(chunk: int, typed: dict[str, Tensor] = typed) -> Tensor:
            pool.chunk = chunk
            return pool(typed, proposals)

        def every_level(typed: dict[str, Tensor] = typed, dtype: torch.dtype = dtype) -> Tensor:
            """The native operator for all RoIs on every level, then each RoI's own: no shape depends on data."""
            level = pool.level_of(proposals[0])
            rois = torch.cat([torch.zeros_like(proposals[0, :, :1]), proposals[0]], 1).to(dtype)
            total = torch.zeros((), dtype=dtype, device=bench.device)
            for index, name in enumerate(pool.levels):
                found = roi_align(typed[name], rois, pool.output_size, scales[index], pool.samples, pool.aligned)
                total = total + found * (level == index)[:, None, None, None]
            return total

        kind = str(dtype).removeprefix("torch.")
        results[f"roi align {kind}, gathered by 256"] = measure(bench, lambda g=gather: g(256))  # type: ignore[misc]  # binds it
        results[f"roi align {kind}, gathered at once"] = measure(bench, lambda g=gather: g(4096))  # type: ignore[misc]  # binds it
        results[f"roi align {kind}, native on every level"] = measure(bench, every_level)
        native = lambda t=typed, d=dtype: model.roi_heads.box_roi_pool(t, [proposals[0].to(d)], [bench.image_size])  # type: ignore[misc]  # noqa: E731
        results[f"roi align {kind}, torchvision's"] = measure(bench, native, static=False)
        with torch.no_grad(), arithmetic("fp32"):
            gap = gather(256).permute(0, 3, 1, 2).float() - every_level().float()
            results[f"roi align {kind}, largest difference of the two"] = float(gap.abs().max())
    pool.chunk = 256
    return results


def forms(bench: Bench) -> dict[str, Any]:
    """Every shape of a CPDBlock in `fast`, fp16: three forms in two layouts, ten calls to a graph."""
    found: dict[str, tuple[CPDBlock, tuple[int, ...]]] = {}
    for task in bench.tasks[-1:] if bench.smoke else ("mask", "keypoint"):
        model = bench.model(task, "fast")  # type: ignore[arg-type]

        def record(block: CPDBlock, inputs: tuple[Tensor, ...]) -> None:
            shape = tuple(inputs[0].shape)
            found.setdefault(f"{shape} -> {block.out_channels}, stride {block.stride[0]}", (block, shape))

        handles = [block.register_forward_pre_hook(record) for block in model.modules() if isinstance(block, CPDBlock)]
        with torch.no_grad(), arithmetic("fp32"):
            model([bench.frames(1)[0].permute(2, 0, 1).float() / 255])
        for handle in handles:
            handle.remove()
    results = bench.partial
    calls = 1 if bench.smoke else 10
    dtype = torch.float16 if bench.on_gpu else torch.float32
    for name, (block, shape) in list(found.items())[: 2 if bench.smoke else None]:
        if bench.left() < 0:
            results[name] = "no time left"
            continue
        times: dict[str, Any] = {}
        for layout in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(shape, device=bench.device).to(dtype).to(memory_format=layout)
            for form in FORMS:
                layer = lower_block(block, None, form).to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
                key = f"{form} {'NHWC' if layout is torch.channels_last else 'NCHW'}"
                measured = measure(bench, lambda f=layer, x=x: [f(x) for _ in range(calls)])  # type: ignore[misc]
                times[key] = measured["median_ms"] * 1e3 / calls if "median_ms" in measured else measured["error"]
        measured_us = {key: value for key, value in times.items() if isinstance(value, float)}
        results[name] = {"us_a_call": times, "fastest": min(measured_us, key=lambda key: measured_us[key], default="")}
    return results


def compiled(bench: Bench) -> dict[str, Any]:
    """`torch.compile` of the static module, captured, beside the module as it is."""
    bench.need_gpu("torch.compile for a GPU")
    results = bench.partial
    calls: dict[str, Any] = {}
    for task, plan, mode in (
        ("box", "fast", "default"),
        ("box", "dense", "default"),
        ("mask", "fast", "default"),
        ("box", "fast", "max-autotune-no-cudagraphs"),
    ):
        variant = Variant(task, plan)  # type: ignore[arg-type]
        if bench.left() < 25:
            results[f"{task} {plan} {mode}"] = "no time left"
            continue
        started = time.perf_counter()
        try:
            plain = bench.graph(variant)
            module: Any = torch.compile(bench.static(variant), fullgraph=True, mode=mode)
            graph = Graph(bench, module, plain.frames, "fp16")
            gap = {n: float((v.float() - plain.replay()[n].float()).abs().max()) for n, v in graph.replay().items()}
            results[f"{task} {plan} {mode}"] = {"compile_s": time.perf_counter() - started, "difference": gap}
            calls |= {f"{task} {plan}": plain.replay, f"{task} {plan} {mode}": graph.replay}
            times = time_in_turn(bench, calls, 20)
            results["times"] = {name: spread(values) for name, values in times.items()}
        except Exception as error:
            results[f"{task} {plan} {mode}"] = {"error": explain(error)}
    return results
