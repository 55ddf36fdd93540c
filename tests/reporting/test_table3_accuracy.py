from norton_deploy.reporting.table3_accuracy import accuracy_report, accuracy_table, cell_name


def cell(ap: float, macs: float) -> dict:
    measures = {"AP": ap, "AP50": 2 * ap, "AR100": ap + 0.1}
    return {"images": 500, "metrics": {"bbox": measures}, "macs": macs, "params": macs / 100}


RESULTS = {
    "settings": {"train_images": 40, "detector_steps": 12, "finetune_steps": 6, "recovery": "both"},
    "cells": {
        cell_name("box", 0, "dense"): cell(0.4, 4e9),
        cell_name("box", 0, "fast"): cell(0.3, 1e9),
        cell_name("box", 0, "fast, distilled"): cell(0.38, 1e9),
        cell_name("box", 1, "dense"): cell(0.5, 4e9),
        cell_name("box", 1, "fast"): cell(0.45, 1e9),
    },
    "latency": {
        "box": {
            "models": {
                "dense": {"latency": {"fps": 10.0}},
                "fast": {"latency": {"fps": 31.0}, "speedup": {"ratio": 3.1, "low": 3.0, "high": 3.2}},
            }
        }
    },
}


def test_retention_is_taken_seed_by_seed() -> None:
    dense, fast, distilled, *paper = accuracy_table(RESULTS, "box", ["dense", "fast", "fast, distilled"]).rows
    assert dense[:5] == ("dense", "0.450 (0.400, 0.500)", "0.900 (0.800, 1.000)", "0.550 (0.500, 0.600)",
                         "1.00 (1.00, 1.00)")  # fmt: skip
    assert fast[4:] == ("0.82 (0.75, 0.90)", "1.00G (75)", "10.00M (75)", "31.0", "3.10 (3.00 to 3.20)")
    assert distilled[4] == "0.95"  # one seed so far
    assert [row[4] for row in paper] == ["1.00", "0.86"]  # 0.32 / 0.37


def test_the_report_holds_the_tasks_that_were_measured(tmp_path) -> None:
    text = accuracy_report(RESULTS).to_markdown(tmp_path)
    assert "## FasterRCNN" in text and "MaskRCNN" not in text
    assert "40 training images; detector steps 12, finetune steps 6" in text
