"""The notebooks as a reader runs them: a real JupyterLab, and the explorer under Voila, each with a kernel of its own."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import nbformat
import pytest
import torch
from conftest import ROOT
from playwright.sync_api import expect

import hinv
from hinv.companion import data

STARTS, RUNS = 120, 240  # seconds that a server may take to answer, and a notebook to run
NAMES = ("00_map", "13_explorer")
FAILED = {"application/vnd.jupyter.error", "application/vnd.jupyter.stderr"}


@pytest.fixture
def place(tmp_path):
    """Copies of the two notebooks, and folders for everything that a server or kernel reads or writes of its user's."""
    (tmp_path / "notebooks").mkdir()
    for name in NAMES:
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "notebooks")
    results = tmp_path / "output" / "results"
    results.mkdir(parents=True)
    for path in ROOT.glob("notebooks/[0-9]*.ipynb"):
        number = path.stem.split("_")[0]
        kept = ROOT / "results" / f"{number}.json"
        if kept.exists():
            shutil.copy(kept, results)
        else:  # in a clone that has not run its notebooks, the map is given something to list
            claim = {
                "statement": "a stand-in",
                "equation": "",
                "measured": 0,
                "relation": "==",
                "bound": 0,
                "passed": True,
            }
            (results / f"{number}.json").write_text(json.dumps({"notebook": number, "claims": [claim]}))
    settings = tmp_path / "settings" / "@jupyterlab"
    for plugin, values in {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page, not only those in sight
    }.items():
        path = settings / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    return tmp_path


@contextmanager
def serving(place, *command):
    """A server in a process of its own while the block runs: its address. It is ended by its handle, whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
        "HINV_OUTPUT": "output",
    }
    environment = os.environ | {name: str(place / folder) for name, folder in own.items()}
    environment |= {"JUPYTER_PATH": str(ROOT / "docs" / "jupyter")}  # as make explore
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = place / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", *(part.format(port=port) for part in command)],
            cwd=place / "notebooks",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            _answers(server, f"http://127.0.0.1:{port}/", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()  # which ends its kernels
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _answers(server, address, log):
    end = time.monotonic() + STARTS
    while time.monotonic() < end:
        assert server.poll() is None, f"the server ended: {log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except urllib.error.HTTPError:  # it wants its token
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no answer in {STARTS} s: {log.read_text()[-2000:]}")


@pytest.fixture
def lab(place):
    token = secrets.token_hex(16)
    command = (
        *("jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port={port}", "--ServerApp.port_retries=0"),
        *("--allow-root", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={place / 'notebooks'}"),
        *("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly"),
    )
    with serving(place, *command) as address:
        yield lambda name: f"{address}/lab/tree/{name}.ipynb?token={token}"


@pytest.fixture
def voila(place):
    command = ("voila", "13_explorer.ipynb", "--no-browser", "--Voila.ip=127.0.0.1", "--port={port}")
    offline = ("--Voila.port_retries=0", "--template=offline")
    with serving(place, *command, *offline) as address:
        yield address


def direct(depth):
    """Parameters, and the inertia of H + 0.1 I, of the explorer's network, made here from the library alone."""
    images = data.load("digits", n=64, normalize=True, dtype=torch.float64)
    x = torch.nn.functional.avg_pool2d(images.x[:16], 2).flatten(1)
    H = hinv.Hessian(hinv.tall_skinny([16, *[6] * (depth - 1), 10]), torch.nn.CrossEntropyLoss(), x, images.y[:16])
    values = torch.linalg.eigvalsh(H.dense() + 0.1 * torch.eye(H.shape[0], dtype=torch.float64))
    return f"{H.shape[0]:,}", f"{int((values > 0).sum()):,} positive, {int((values < 0).sum()):,} negative"


def run_all(page, name):
    """Run > Run All Cells, until every cell has its number and the kernel is idle. The cells' outputs."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    expect(page.locator(".jp-CodeCell")).to_have_count(len(cells), timeout=1000 * STARTS)
    idle = page.get_by_text("Python 3 (ipykernel) | Idle")  # of the status bar: what is run before is lost
    expect(idle).to_be_visible(timeout=1000 * STARTS)
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
    prompts = page.locator(".jp-CodeCell .jp-InputArea-prompt")
    expect(prompts).to_have_text([f"[{k + 1}]:" for k in range(len(cells))], timeout=1000 * RUNS)
    expect(idle).to_be_visible(timeout=30_000)
    return cells, page.locator(".jp-CodeCell .jp-OutputArea-output")


def promised(cells):
    """What the committed outputs say that no machine may change, and how many pictures they hold."""
    outputs = [output for cell in cells for output in cell.outputs]
    lines = [line for o in outputs for line in o.get("text", "").splitlines() if line.startswith("ok: ")]
    return lines, sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_lab(name, lab, page, shoot):
    page.goto(lab(name))
    cells, outputs = run_all(page, name)
    lines, pictures = promised(cells)
    assert lines and pictures
    for mime in FAILED:
        assert page.locator(f"[data-mime-type='{mime}']").count() == 0
    text = outputs.all_inner_texts()
    shown = {line for output in text for line in output.splitlines()}
    assert set(lines) <= shown
    assert page.locator(".jp-RenderedImage img").count() == pictures
    shoot(page, f"lab_{name}")


def test_the_sliders_move_in_lab(lab, page, shoot):
    page.goto(lab("13_explorer"))
    run_all(page, "13_explorer")
    moves(page)
    shoot(page, "lab_slider")


def test_the_sliders_move_under_voila(voila, page, shoot):
    page.goto(voila, timeout=1000 * RUNS, wait_until="commit")  # which comes when the notebook has run
    expect(page.locator(".widget-slider").first).to_be_visible(timeout=1000 * RUNS)
    assert page.get_by_text("import torch").count() == 0, "the code is hidden"
    moves(page)
    shoot(page, "voila_slider")
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator(".widget-slider").first.evaluate("slider => slider.scrollIntoView()")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out on a phone"
    shoot(page, "voila_phone")


def moves(page):
    """The depth slider goes one step to the right: the page then shows what the library says of nine layers."""
    box = page.locator(".widget-vbox")
    expect(box.get_by_text(direct(8)[1])).to_be_visible(timeout=30_000)
    handle = box.locator(".widget-slider", has_text="depth").get_by_role("slider")
    handle.scroll_into_view_if_needed()
    handle.focus()
    handle.press("ArrowRight")
    for value in direct(9):
        expect(box.get_by_role("cell", name=value, exact=True)).to_be_visible(timeout=30_000)
    expect(box.get_by_alt_text("9 layers of 6, tanh")).to_be_visible()
    expect(box.get_by_text(direct(8)[1])).to_have_count(0)
