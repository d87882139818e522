"""The same tests on every machine: no random seed, no clock, and the CPU even beside a GPU."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # networks here are so small that more only wait for each other

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("helpers")
settings.register_profile(
    "semanticgen", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("semanticgen")


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("run.default_device", lambda: torch.device("cpu"))
        yield


@pytest.fixture(scope="module")
def no_curves():
    """Of losses: they take much of the time of runs of six steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plumbing.metrics.Metrics.plot", lambda _: None)
        yield
