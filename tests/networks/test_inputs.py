"""Example inputs: how a network is called with them, their samples, and their shapes as data."""

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap.networks.inputs import Samples, batch_size, call, describe, materialize, rebuild, tensors_in, vary

A, B = torch.zeros(2, 3), torch.ones(2, 1)


@dataclass
class Output:
    logits: Tensor
    names: list[str]


NESTED: dict[str, tuple[Any, int]] = {
    "tensor": (A, 1),
    "tuple and list": ((A, [B, 3, A]), 3),
    "dict": ({"x": A, "sizes": [1, 2], "more": {"y": B}}, 2),
    "dataclass": (Output(A, ["cat"]), 1),
    "nothing": ("text", 0),
}


@pytest.mark.parametrize(("value", "count"), NESTED.values(), ids=NESTED)
def test_tensors_are_found_wherever_they_are_nested(value: Any, count: int) -> None:
    assert len(list(tensors_in(value))) == count


class Difference(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x if y is None else x - y


@pytest.mark.parametrize(
    ("example", "result"),
    [(A, A), ((A, B), A - B), ({"y": B, "x": A}, A - B)],
    ids=["one argument", "tuple", "dict"],
)
def test_a_tuple_is_positional_and_a_dict_is_keywords(example: Any, result: Tensor) -> None:
    assert torch.equal(call(Difference(), example), result)


SIZES: dict[str, tuple[Any, int]] = {
    "tensor": (A, 2),
    "number": (torch.tensor(3.0), 1),
    "list of images": ([torch.zeros(3, 8, 8)] * 5, 5),
    "tuple": ((A, torch.zeros(7)), 2),
    "dict": ({"x": A}, 2),
    "empty": ((), 1),
}


@pytest.mark.parametrize(("example", "size"), SIZES.values(), ids=SIZES)
def test_batch_size(example: Any, size: int) -> None:
    assert batch_size(example) == size


def test_made_inputs_have_the_networks_type_and_keep_whole_numbers() -> None:
    example = {"x": torch.empty(4, 3, device="meta"), "wide": A.double(), "label": torch.tensor([7, 8])}
    example["unknown"] = example["label"].to("meta")
    made, again = (materialize(example, torch.device("cpu"), torch.float16, seed=3) for _ in range(2))
    assert (made["x"].dtype, made["wide"].dtype) == (torch.float16, torch.float64)
    assert (made["label"].tolist(), made["unknown"].tolist()) == ([7, 8], [0, 0])
    assert made["x"].std() > 0
    assert all(torch.equal(made[key], again[key]) for key in example)


SAID: dict[str, tuple[Tensor, bool]] = {
    "lengths": (torch.tensor([1.0, 0.6]), True),
    "lengths that are alike": (torch.ones(2), True),
    "placeholder of lengths": (torch.zeros(2), False),
    "not a number": (torch.tensor([1.0, float("nan")]), False),
    "mask": (torch.tensor([[1.0, 1.0], [1.0, 0.0]]), True),
    "ones": (torch.ones(2, 3), False),
    "image": (torch.rand(2, 3, 4, 4), False),
}


@pytest.mark.parametrize(("tensor", "stays"), SAID.values(), ids=SAID)
def test_floats_stay_where_their_values_say_something(tensor: Tensor, stays: bool) -> None:
    made = materialize(tensor, torch.device("cpu"), torch.float32, seed=0)
    assert torch.equal(made, tensor) is stays
    assert torch.equal(vary(tensor, Samples(2), seed=0), tensor) is stays


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, x), lambda x: {"x": x}], ids=["tensor", "tuple", "dict"])
def test_every_sample_but_the_first_is_another(wrap: Any) -> None:
    x = torch.randn(3, 5)
    for before, after in zip(tensors_in(wrap(x)), tensors_in(vary(wrap(x), Samples(3), seed=1)), strict=True):
        assert torch.equal(before[0], after[0])
        assert (before[1:] != after[1:]).all()


def test_of_a_list_every_image_but_the_first_is_another() -> None:
    images, labels = [torch.randn(3, 4), torch.randn(3, 4)], torch.tensor([1, 2])
    varied = vary((images, labels), Samples(2, listed=True), seed=1)
    assert torch.equal(varied[0][0], images[0])
    assert not torch.equal(varied[0][1], images[1])
    assert torch.equal(varied[1], labels)


DESCRIBED: dict[str, Any] = {
    "tensor": A,
    "half": A.half(),
    "whole numbers": torch.tensor([1, 2]),
    "tuple": (A, B),
    "list": [A, B],
    "dict": {"x": A, "nested": {"y": (B,)}},
}


@pytest.mark.parametrize("example", DESCRIBED.values(), ids=DESCRIBED)
def test_shapes_and_types_survive_json(example: Any) -> None:
    made = rebuild(json.loads(json.dumps(describe(example))))
    assert type(made) is type(example)
    for before, after in zip(tensors_in(example), tensors_in(made), strict=True):
        assert (after.shape, after.dtype, after.device.type) == (before.shape, before.dtype, "meta")


@pytest.mark.parametrize("example", [(A, "text"), {"x": None}, 3], ids=["tuple", "dict", "number"])
def test_what_is_no_tensor_is_not_described(example: Any) -> None:
    assert describe(example) is None


SPECS: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "an example input cannot be {}"),
    "no dict": ([1], "an example input cannot be [1]"),
    "unknown type": ({"tensor": [2], "dtype": "nn"}, "is not a tensor's shape and dtype"),
    "negative size": ({"tensor": [-2], "dtype": "float32"}, "is not a tensor's shape and dtype"),
    "unknown container": ({"set": []}, "'set' is not a container of example inputs"),
}


@pytest.mark.parametrize(("spec", "message"), SPECS.values(), ids=SPECS)
def test_what_describe_did_not_write_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rebuild(spec)
