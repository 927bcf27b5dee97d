"""Weights of other number types: refused, widened without loss, or rounded with a warning."""

import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import orograph as og

TYPES = {"floating": ["float16", "bfloat16", "float32", "float8_e4m3fn"], "other": ["int8", "uint8", "int16", "int32", "int64", "bool", "complex64", "complex128", "qint8"]}
PLACES = ("0.weight", "1.running_mean", "2.bias")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()


@pytest.fixture
def objective():
    return make_objective()


def make_objective():
    return og.Objective(network(), nn.CrossEntropyLoss(), (torch.randn(8, 3), torch.arange(8) % 2), params=["0.*"])


def weights(place, dtype):
    state = network().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own: quantised tensors are on their way out
        state[place] = torch.quantize_per_tensor(state[place], 0.1, 0, torch.qint8) if dtype == "qint8" else (state[place] + 0.3).to(getattr(torch, dtype))
    return state


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", TYPES["other"])
def test_weights_that_are_no_floating_point_numbers_are_refused(objective, place, dtype, tmp_path):
    state = weights(place, dtype)
    sources = [state]
    if dtype != "qint8":
        torch.save(state, tmp_path / "w.pt")
        sources.append(tmp_path / "w.pt")
    if not dtype.startswith(("complex", "q")):
        save_file(state, tmp_path / "w.safetensors")
        sources.append(tmp_path / "w.safetensors")
    for source in sources:
        with pytest.raises(ValueError, match=rf"{place} is {dtype} in the given weights, and float32 in this network\. (Turn quantised|Save real)"):
            objective.point(source)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", TYPES["floating"])
def test_narrower_weights_are_widened_without_loss(objective, place, dtype):
    state = weights(place, dtype)
    back = objective.state_dict(objective.point(state))
    assert torch.equal(back[place], state[place].float())


@pytest.mark.parametrize("place", PLACES)
def test_wider_weights_are_rounded_with_a_warning_where_they_change(objective, place):
    state = network().state_dict()
    objective.point({name: value.double() if value.is_floating_point() else value for name, value in state.items()})  # no digit is lost
    state[place] = state[place].double() + 1e-12
    with pytest.warns(og.OrographWarning, match=rf"{place} is float64 in the given weights, and rounded to the float32 of this network\. Objective\(\.\.\., dtype=torch\.float64\) keeps it"):
        objective.point(state)


def test_flat_tensors_and_models_of_other_numbers_are_refused(objective):
    with pytest.raises(ValueError, match="needs floating-point entries, got int64"):
        objective.point(torch.zeros(objective.size, dtype=torch.int64))
    with pytest.raises((TypeError, ValueError), match=r"parameter 'weight' is torch\.complex64: only floating-point parameters have curvature"):
        og.Objective(nn.Linear(3, 2, dtype=torch.complex64), nn.MSELoss(), (torch.randn(8, 3, dtype=torch.complex64), torch.randn(8, 2)))
