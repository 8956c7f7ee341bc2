"""What a stranger sees first: the animated elimination and the social picture are what their script makes, and the demo says what is so."""

import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hinv
from hinv.companion import demo, figures, front

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def numbers():
    return front.told()


def test_the_elimination_in_docs_is_what_the_script_makes(numbers):
    committed = (DOCS / "elimination.svg").read_text("utf-8")
    assert committed == front.elimination(numbers), "make front writes it anew"
    assert len(committed) < 500_000


def test_its_numbers_are_those_of_the_network(numbers):
    positive, negative, zero = numbers.inertia
    assert zero == 0 and positive == sum(p for p, _ in numbers.pivots) and negative == sum(n for _, n in numbers.pivots)
    parameters = [a * b + b for a, b in zip(front.SIZES, front.SIZES[1:], strict=False)]
    assert [sum(pair) for pair in numbers.pivots] == parameters == list(numbers.sizes[::3])
    assert list(numbers.sizes[1:-3:3]) == list(numbers.sizes[2:-3:3]) == [front.BATCH * a for a in front.SIZES[1:-1]]
    images = front.data.load("digits", n=front.BATCH, normalize=True, dtype=torch.float64)
    model = hinv.tall_skinny(front.SIZES, gain=1.2)
    H = hinv.Hessian(model, torch.nn.CrossEntropyLoss(), images.x[:, 0, 3, :6], images.y % 3)
    assert int((torch.linalg.eigvalsh(H.dense()) < -front.DAMPING).sum()) == negative
    svg = front.elimination(numbers)
    assert svg.count('class="plus"') == positive and svg.count('class="minus"') == negative
    assert f"together: {positive} positive, {negative} negative" in svg


def test_it_is_one_file_without_a_script(numbers):
    svg = front.elimination(numbers)
    root = ElementTree.fromstring(svg)
    names = {element.tag.split("}")[1] for element in root.iter()}
    assert names == {"svg", "title", "desc", "style", "rect", "text", "g"}
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|href", svg)


def test_it_stands_still_at_its_end_for_who_wants_that(numbers):
    """All animations are inside the query for readers without that wish; what is seen without them is the last scene."""
    svg = front.elimination(numbers)
    style = svg[svg.index("<style>") : svg.index("</style>")]
    still, moving = style.split("@media(prefers-reduced-motion:no-preference)")
    assert "animation" not in still and moving.count("@keyframes") > 20
    last = re.findall(r'<g class="t\d+ last" >(.*?)</g>', svg)
    assert sum("is solved" in element for element in last) == 1
    assert sum("Now forwards" in element for element in last) == 0
    assert sum(f">x{front.told().layers}<" in element for element in last) == 1


def test_the_social_picture_is_what_the_script_makes():
    deep = front.told(*front.DEEP)
    made = Image.open(io.BytesIO(figures.social(deep.sizes, deep.blocks, deep.inertia, front.DAMPING)))
    committed = Image.open(DOCS / "social.png")
    assert made.size == committed.size == (1280, 640)
    a, b = (np.asarray(picture.convert("RGB"), float) for picture in (made, committed))
    assert np.abs(a - b).mean() < 1.0, "make front writes it anew"  # another machine's fonts may be smoothed otherwise


def test_the_demo_says_what_is_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HINV_OUTPUT", str(tmp_path))
    demo.main()
    printed = capsys.readouterr().out
    code = [
        line
        for line in printed.splitlines()
        if (" = " in line and "hinv" in line) or line.startswith(("step", "inertia", "counts"))
    ]
    assert len(code) == 5
    x, y = torch.randn(16, 20, generator=torch.manual_seed(0)).double(), torch.arange(16) % 10
    H = hinv.Hessian(hinv.tall_skinny([20, *[8] * 20, 10]), torch.nn.CrossEntropyLoss(), x, y)
    values = torch.linalg.eigvalsh(H.dense())
    assert f"negative eigenvalues of H + 0.1 I, of {len(values):,}: {int((values < -0.1).sum()):,}\n" in printed
    assert f"eigenvalues of H between -1 and 1: {int((values.abs() < 1).sum()):,}\n" in printed
    (residual,) = re.findall(r"solver: (\S+)", printed)
    assert float(residual) < 1e-8
    assert Image.open(tmp_path / "figures" / "demo.png").size[0] > 1000
