"""What every test shares: backends, seeds, no network, and a count of tests per backend.

A test that takes ``backend`` runs once per back end of its module's BACKENDS, one that takes
``backend_or_reference`` also with the oracle itself, one that takes ``kernel`` without eager. The
counts at the end of a run make a back end that did not run visible.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import random
import socket
import sys
from pathlib import Path

import numpy
import pytest

# Before torch: threads that wait by spinning make small tests many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

os.environ.setdefault("PYMEND_KERNELS", "all")  # the gate is for users: tests run every kernel
os.environ.setdefault("HF_HUB_OFFLINE", "1")

BACKENDS = ("reference", "eager", "cpu", "emu", "cuda")


def _load_natives_from(folder: Path) -> None:
    """Use the modules of another build, such as the one with sanitizers."""
    for name, pattern in (("pymend._C", "_C*.so"), ("_emu", "_emu*.so")):
        spec = importlib.util.spec_from_file_location(name, next(folder.glob(pattern)))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


if "PYMEND_NATIVES" in os.environ:
    _load_natives_from(Path(os.environ["PYMEND_NATIVES"]))


def _no_network(self: socket.socket, address: object, *_: object) -> None:
    raise OSError(f"tests do not use the network: connection to {address} refused")


def pytest_configure(config: pytest.Config) -> None:
    real = socket.socket.connect

    def connect(self: socket.socket, address: object) -> None:
        (real if self.family == socket.AF_UNIX else _no_network)(self, address)

    socket.socket.connect = connect  # type: ignore[method-assign, assignment]


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = getattr(metafunc.module, "BACKENDS", ())
    sets = {
        "backend": names,
        "backend_or_reference": ("reference", *names),
        "kernel": [b for b in names if b != "eager"],
    }
    for argument in sets.keys() & set(metafunc.fixturenames):
        marks = {"cuda": pytest.mark.cuda}
        values = [pytest.param(b, marks=marks.get(b, ())) for b in sets[argument]]
        metafunc.parametrize(argument, values, indirect=True)


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a back end, skipped with the reason where it cannot run."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "cpu":
        from pymend import _lib

        _need(_lib.has_kernels(), "the native module _C is not built")
    if name == "emu":
        _need(
            "_emu" in sys.modules or importlib.util.find_spec("_emu") is not None,
            "the emulation module _emu is not built (it needs pybind11)",
        )
    return name


backend_or_reference = kernel = backend


def _need(there: bool, reason: str) -> None:
    if not there and os.environ.get("PYMEND_REQUIRE_KERNELS") == "1":
        pytest.fail(reason)
    if not there:
        pytest.skip(reason)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = (yield).get_result()
    callspec = getattr(item, "callspec", None)
    for name in ("backend", "backend_or_reference", "kernel"):
        if callspec is not None and name in callspec.params:
            report.user_properties.append(("backend", callspec.params[name]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, collections.Counter[str]] = {b: collections.Counter() for b in BACKENDS}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            backend = dict(getattr(report, "user_properties", ())).get("backend")
            if backend in counts:
                counts[backend][outcome] += 1
    if any(counts.values()):
        terminalreporter.section("tests per back end")
        for backend, count in counts.items():
            ran = count["passed"] + count["failed"]
            terminalreporter.line(
                f"{backend:9s} {ran:5d} ran, {count['failed']} failed, {count['skipped']} skipped"
            )
