"""The stand-in for torchvision's non-maximum suppression."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from qcompile.demo import faces


def test_nms_keeps_the_best_of_what_overlaps_within_a_group() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [0, 0, 10, 10], [0, 5, 10, 15]])
    scores = torch.tensor([0.5, 0.9, 0.1, 0.6, 0.7])
    one = torch.zeros(5, dtype=torch.int64)
    # IoU with box 1: 0.82 of box 0 and of box 3, 0.29 of box 4.
    assert faces.batched_nms(boxes, scores, one, 0.5).tolist() == [1, 4, 2]
    assert faces.batched_nms(boxes, scores, torch.tensor([0, 0, 0, 1, 0]), 0.5).tolist() == [1, 4, 3, 2]
    assert faces.batched_nms(boxes, scores, one, 0.9).tolist() == [1, 4, 3, 2]  # boxes 0 and 3 are the same
    assert faces.batched_nms(boxes[:0], scores[:0], one[:0], 0.5).tolist() == []


def test_nms_is_an_operator() -> None:
    torch.library.opcheck(faces.batched_nms, (torch.rand(6, 4), torch.rand(6), torch.zeros(6, dtype=torch.int64), 0.5))


def test_torchvision_is_stood_in_for_only_while_importing(tmp_path: Path) -> None:
    before = {name: sys.modules.get(name) for name in ("torchvision", "torchvision.ops.boxes")}
    try:
        with faces._importable(tmp_path):
            from torchvision.ops.boxes import batched_nms

            assert batched_nms is faces.batched_nms
        assert {name: sys.modules.get(name) for name in before} == before
    finally:
        if not getattr(sys.modules.get("facenet_pytorch"), "__file__", None):
            sys.modules.pop("facenet_pytorch", None)


def test_photo_names_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    monkeypatch.setattr(faces, "unpacked", lambda *_: tmp_path)
    with pytest.raises(ValueError, match="no photo 'nobody'; there are astronaut"):
        faces.photo("nobody")
