"""What a function reaches: tensors with their places and names, and what a call changed."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

import pytest
import torch
from torch import nn

from qcompile import reach
from qcompile.reach import Closed, Reach, ReachError


class Holder:
    def __init__(self) -> None:
        self.table, self.many = torch.ones(2), [torch.ones(3), {"deep": torch.ones(4)}]
        self.pair, self.some, self.count = (torch.ones(5), 1), {torch.ones(6)}, 0


def test_places_and_names() -> None:
    model, holder, loose = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), Holder(), torch.ones(7)
    default = torch.ones(8)
    pair = {"it": default}

    def function(x: Any, by: Any = default, *, and_by: Any = pair) -> Any:
        return model, holder, loose

    found = Reach(function)
    assert {k.name: k.in_module for places in found.kept.values() for k in places} == {
        "0.weight": True, "0.bias": True, "1.weight": True, "1.bias": True, "1.running_mean": True, "1.running_var": True,
        "1.num_batches_tracked": True, "holder.table": False, "holder.many.0": False, "holder.many.1.deep": False,
        "holder.pair.0": False, "holder.some": False, "loose": False, "0": False, "and_by.it": False,
    }  # fmt: skip
    for places in found.kept.values():
        assert all(link.container[link.key] is link.held for k in places for link in k.links)
    assert found.paths == {id(model): "", id(model[0]): "0", id(model[1]): "1"}
    link = found.kept[id(loose)][0].links[0]
    loose = torch.ones(7)
    assert link.container[link.key] is loose
    assert [link.held for link in found.kept[id(model[1].bias)][0].links] == [model[1].bias, model[1], model]


def test_one_tensor_in_two_places() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert [[k.name for k in places] for places in Reach(model).kept.values()] == [["0.weight", "1.weight"]]


def test_cycles_partials_and_methods_end() -> None:
    holder = Holder()
    holder.many.append(holder)
    assert len(Reach(functools.partial(print, holder)).kept) == 5
    model = nn.Linear(2, 2)
    assert [k.name for places in Reach(model.forward).kept.values() for k in places] == ["weight", "bias"]


def test_changes_are_seen_and_taken_back() -> None:
    model, holder = nn.Linear(2, 2), Holder()
    before = {**vars(holder), "many": list(holder.many)}, dict(model._parameters)
    found = Reach(lambda: (model, holder))
    assert found.changed() == []
    holder.count = 1
    holder.many.append(3)
    holder.many[1]["deep"] = torch.ones(4)
    model.weight = nn.Parameter(torch.ones(2, 2))
    model.extra = 5
    assert set(found.changed()) == {"holder.count", "holder.many", "holder.many.1.deep", "weight", "extra"}
    found.restore()
    assert found.changed() == [] and holder.many == before[0]["many"] and not hasattr(model, "extra")
    assert model.weight is before[1]["weight"]


def test_equal_numbers_are_no_change_and_stand_ins_neither() -> None:
    holder = Holder()
    found = Reach(lambda: holder)
    holder.count = int("0")
    fake = torch.zeros(2)
    old, holder.table = holder.table, fake
    assert found.changed() == ["holder.table"]
    assert found.changed(lambda now, before: now is fake and before is old) == []
    holder.count = False
    assert found.changed(lambda now, before: now is fake and before is old) == ["holder.count"]


def test_what_is_closed_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Closed):
        def __init__(self) -> None:
            self.tensor = torch.ones(2)

    own = Own()
    assert not Reach(lambda: own).kept
    monkeypatch.setattr(reach, "MOST_OBJECTS", 10)
    many = [[i] for i in range(20)]
    with pytest.raises(ReachError, match="more than 10 objects"):
        Reach(lambda: many)


def test_variables_of_closures_and_queues_are_state() -> None:
    count, queue = 0, deque([1, 2], maxlen=2)

    def function() -> Any:
        nonlocal count
        count += 1
        queue.append(3)
        return count

    found = Reach(function)
    function()
    assert found.changed() == ["count", "queue"]
    found.restore()
    assert found.changed() == [] and count == 0 and list(queue) == [1, 2]
