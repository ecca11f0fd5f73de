"""The runners of a training step under Node and in a browser end with the parameters that torch has.

They need Node 20 with ``npm ci`` in ``sample_models/train_step``; the page also Chromium, its driver, and selenium.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from gradctl.commands.export_train_step import export_train_step
from gradctl.core.target_options import TargetOptions
from gradctl.subject.loading.load import load_subject, make_subject
from tests.commands.test_export_train_step import LOSSES, made
from tests.training.step_runner import StepRunner

RUNNERS = Path("sample_models/train_step")
SPIRALS = RUNNERS / "spirals.py"
STEPS = 20
_OLDEST_NODE = 20


def why_without_node():
    """Return why Node cannot run a training step, or nothing."""
    node = shutil.which("node")
    if node is None:
        return "Node is not installed"
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < _OLDEST_NODE:
        return f"Node {version} is older than {_OLDEST_NODE}"
    if not (RUNNERS / "node_modules/onnxruntime-web").is_dir():
        return f"onnxruntime-web is not installed: npm ci in {RUNNERS}"
    return ""


def why_without_browser():
    """Return why the page cannot be opened, or nothing."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    missing += [] if importlib.util.find_spec("selenium") else ["selenium"]
    return f"not installed: {', '.join(missing)}" if missing else why_without_node()


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_without_node()), reason=why_without_node())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the runners, and the step of the spirals."""
    made = tmp_path_factory.mktemp("runners")
    for each in RUNNERS.iterdir():
        if each.is_file():
            shutil.copy(each, made)
    (made / "node_modules").symlink_to((RUNNERS / "node_modules").resolve())
    subject = load_subject(TargetOptions(str(SPIRALS)))
    written = export_train_step(subject, made / "spirals.onnx", optimizer=f"{SPIRALS}:optimizer")
    assert written.written
    return made


@functools.cache
def trained_by_torch():
    """Return the losses and the parameters of plain steps of torch.optim."""
    spec = importlib.util.spec_from_file_location("spirals", SPIRALS)
    spirals = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(spirals)
    model, inputs, losses = spirals.make_model(), spirals.example_inputs(), []
    optimizer = spirals.optimizer(list(model.parameters()))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: each.detach() for name, each in model.named_parameters()}


@pytest.mark.parametrize("command", [[sys.executable, "run.py"], ["node", "run.mjs"]], ids=["python", "node"])
def test_losses_of_a_runner_are_those_of_torch(folder, command):
    done = subprocess.run(
        [*command, "spirals.onnx", str(STEPS)], cwd=folder, capture_output=True, text=True, check=True
    )
    losses = [float(each) for each in re.findall(r"loss ([\d.]+)", done.stdout)]
    np.testing.assert_allclose(losses, trained_by_torch()[0], atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_each_kind_under_node_are_those_of_onnxruntime(folder, name):
    model, x, loss = made(name)
    path = folder / f"{name.replace(' ', '_')}.onnx"
    subject = make_subject(model, x, loss=loss)
    assert export_train_step(subject, path, optimizer="adamw").written  # 20 steps are those of torch
    done = subprocess.run(
        ["node", "run.mjs", path.name, str(STEPS)], cwd=folder, capture_output=True, text=True, check=True
    )
    runner = StepRunner(path)
    expected = [float(runner.step()["loss"]) for _ in range(STEPS)]
    losses = [float(each) for each in re.findall(r"loss ([\d.]+)", done.stdout)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=2e-6)
    assert losses[-1] < losses[0]


@pytest.fixture
def address(folder):
    """Serve the folder, with the files of onnxruntime-web beside the page."""
    subprocess.run(["node", "copy_runtime.mjs"], cwd=folder, check=True)
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.skipif(bool(why_without_browser()), reason=why_without_browser())
def test_page_trains_as_torch_does_without_an_error(address):
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--window-size=360,800"):  # root has no sandbox
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.get(f"{address}/index.html?steps={STEPS}")
        WebDriverWait(browser, 60).until(lambda page: page.execute_script("return !!window.finished"))
        losses = browser.execute_script("return Array.from(finished.losses)")
        values = browser.execute_script(
            "return Object.fromEntries(Object.entries(finished.values).filter(([name]) => name.startsWith('net.'))"
            ".map(([name, value]) => [name, Array.from(value.data)]))"
        )
        assert browser.get_log("browser") == []
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    expected, parameters = trained_by_torch()
    np.testing.assert_allclose(losses, expected, atol=2e-6)
    assert losses[-1] < losses[0]
    for name, parameter in parameters.items():
        torch.testing.assert_close(torch.tensor(values[name]).reshape(parameter.shape), parameter, rtol=1e-4, atol=1e-5)
