"""What `make front` writes: docs/elimination.svg, the elimination of one small network step by step, and docs/social.png.

The picture is drawn from a real network's numbers and moves by CSS alone, without a script. Where a reader's system asks for less motion, it stands still
at its end.
"""

import html
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from hinv import paper
from hinv.companion import data, figures
from hinv.companion.checks import ROOT, write_atomically
from hinv.curvature import Hessian
from hinv.network import tall_skinny
from hinv.solver.factor import Factor

SIZES, BATCH, DAMPING = (6, 4, 4, 4, 4, 4, 3), 3, 0.1
DEEP = (8, *[8] * 11, 10), 8  # of the social picture: sizes and batch
OPENING, BACK, COUNTED, FORTH, END = (
    7.0,
    6.0,
    6.0,
    2.5,
    9.0,
)  # seconds: of each scene, and of each layer on the way back and forth
LEFT, TOP, SIDE = 24.0, 64.0, 480.0  # of the matrix, in a picture of 900 x 580
RIGHT = 560.0  # where the words begin

STYLE = """
svg{--ink:#222;--faint:#999;--paper:#fff;--x:#0173b2;--y:#de8f05;--z:#029e73;--V:#d55e00;--S:#8a8a8a;--done:#7d55b8;font:14px system-ui,sans-serif}
@media(prefers-color-scheme:dark){svg{--ink:#eee;--faint:#888;--paper:#181818;--S:#777;--x:#3f9fdc;--y:#e5a53a;--z:#23b98c;--V:#f0813c;--done:#a883e0}}
text{fill:var(--ink)}.paper{fill:var(--paper)}.small{font-size:12px}.title{font-size:20px;font-weight:600}.faint{fill:var(--faint)}
.x{fill:var(--x)}.y{fill:var(--y)}.z{fill:var(--z)}.V{fill:var(--V)}.S{fill:var(--S)}.plus{fill:var(--x)}.minus{fill:var(--V)}.known{fill:var(--done)}
.frame{fill:none;stroke:var(--ink);stroke-width:2}.wait{fill:none;stroke:var(--faint);stroke-width:1}.last{opacity:1}.gone{opacity:0}.white{fill:#fff}
"""


@dataclass
class Told:
    """The numbers of one network: sizes of K's blocks, listed by layer, which of them are stored, and each layer's pivots by sign."""

    sizes: tuple[int, ...]
    blocks: list[tuple[int, int]]
    pivots: list[tuple[int, int]]
    inertia: tuple[int, int, int]

    @property
    def layers(self) -> int:
        return len(self.pivots)


def told(sizes: Sequence[int] = SIZES, batch: int = BATCH, damping: float = DAMPING) -> Told:
    """Of a tanh network at its first weights on digits.

    Raises:
        AssertionError: the solve is not exact to 12 digits, as the picture says it is.
    """
    images = data.load("digits", n=batch, normalize=True, dtype=torch.float64)
    pixels = images.x[:, 0, 3, : sizes[0]]
    H = Hessian(tall_skinny(sizes, gain=1.2), torch.nn.CrossEntropyLoss(), pixels, images.y % sizes[-1])
    factored, K = H.factor(damping), paper.matrices(H, damping).K_pivoted
    assert isinstance(factored, Factor)
    step = H.solve(H.gradient, damping, method="factor")
    assert (H @ step + damping * step - H.gradient).norm() <= 1e-12 * H.gradient.norm()
    stages = list(reversed(factored.pivots))
    pivots = [(factored.sizes[n] - stages[n].negative, stages[n].negative) for n in factored.owners]
    return Told(K.row_sizes, sorted(K.blocks), pivots, factored.inertia)


class Scenes(NamedTuple):
    """Seconds at which they begin: each layer leaves, the signs are counted, each layer's part of the step is found, all is solved."""

    leaves: list[float]
    counted: float
    found: list[float]
    solved: float

    @classmethod
    def of(cls, layers: int) -> "Scenes":
        counted = OPENING + BACK * layers
        forth = counted + COUNTED
        leaves = [OPENING + BACK * (layers - 1 - layer) for layer in range(layers)]
        return cls(leaves, counted, [forth + FORTH * layer for layer in range(layers)], forth + FORTH * layers)


@dataclass
class Film:
    """Elements of an SVG that appear and go at given seconds: one CSS animation for each course of time."""

    seconds: float
    elements: list[str] = field(default_factory=list)
    courses: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def add(self, element: str, appears: float = 0.0, goes: float | None = None) -> None:
        """An element "<rect .../>", there from one time to the other (None: to the end, and on the still picture)."""
        if appears == 0.0 and goes is None:
            self.elements.append(element)
            return
        name, *rest = element.split(" ", 1)
        still = "gone" if goes is not None else "last"
        self.elements.append(f'{name} class="{self._course("opacity", appears, goes)} {still}" {"".join(rest)}')

    def _course(self, *course: Any) -> str:
        return self.courses.setdefault(course, f"t{len(self.courses)}")

    def moves(self, stops: Sequence[tuple[float, float, float]], goes: float) -> str:
        """The class of an element that is there from the first (time, x, y) until it goes, and moves to the others at their times."""
        return self._course("moves", tuple(stops), goes)

    def _at(self, second: float) -> str:
        return f"{100 * second / self.seconds:.2f}%"

    def _rules(self) -> Iterator[str]:
        for course, name in self.courses.items():
            if course[0] == "opacity":
                _, appears, goes = course
                steps = [(0.0, float(appears == 0.0))]
                if appears > 0.0:
                    steps += [(appears, 0.0), (appears + 0.6, 1.0)]
                if goes is not None:
                    steps += [(goes, 1.0), (goes + 0.6, 0.0)]
                frames = "".join(f"{self._at(t)}{{opacity:{value:g}}}" for t, value in steps)
                frames += f"100%{{opacity:{steps[-1][1]:g}}}"
            else:
                _, stops, goes = course
                begin, x, y = stops[0]
                frames = f"0%,{self._at(begin)}{{opacity:0;transform:translate({x:.1f}px,{y:.1f}px)}}"
                for k, (t, x, y) in enumerate(stops):
                    leaves = stops[k + 1][0] - 1.0 if k + 1 < len(stops) else goes
                    here = f"opacity:1;transform:translate({x:.1f}px,{y:.1f}px)"
                    frames += f"{self._at(t + 0.6)},{self._at(leaves)}{{{here}}}"
                frames += f"{self._at(goes + 0.6)},100%{{opacity:0;transform:translate({x:.1f}px,{y:.1f}px)}}"
            yield f"@keyframes {name}{{{frames}}}.{name}{{animation:{name} {self.seconds:g}s linear infinite}}"

    def svg(self, width: int, height: int, title: str, description: str) -> str:
        rules = "\n".join(self._rules())
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title desc">\n'
            f'<title id="title">{html.escape(title)}</title><desc id="desc">{html.escape(description)}</desc>\n'
            f"<style>{STYLE}@media(prefers-reduced-motion:no-preference){{\n{rules}\n}}</style>\n"
            f'<rect class="paper" width="{width}" height="{height}"/>\n' + "\n".join(self.elements) + "\n</svg>\n"
        )


def text(x: float, y: float, words: str, look: str = "") -> str:
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}">{html.escape(words)}</text>'


def rect(look: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{look}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def group(content: str) -> str:
    return f"<g >{content}</g>"


def elimination(numbers: Told) -> str:
    """The film: K' by layer, the way back that leaves a pivot of each layer, their signs, the way forth that gives the step."""
    layers, scenes = numbers.layers, Scenes.of(numbers.layers)
    ends = list(itertools.accumulate(numbers.sizes, initial=0))
    at = [SIDE * end / ends[-1] for end in ends]
    film = Film(scenes.solved + END)
    film.add(text(LEFT, 34, "One solve, stage by stage", "title"))
    _matrix(film, numbers, at, scenes)
    side = SIDE * numbers.sizes[1] / ends[-1]
    # V goes back through the blocks (z, y) of the layers, and y forth
    place = lambda l: (LEFT + at[3 * l + 1], TOP + at[3 * l + 2])
    back = [(scenes.leaves[l] + 2.0, *place(l - 1)) for l in reversed(range(1, layers))]
    forth = [(scenes.found[l] + 1.2, *place(l)) for l in range(layers - 1)]
    for name, stops, goes in (("V", back, scenes.leaves[0]), ("y", forth, scenes.found[-1])):
        mark = rect(name, 0, 0, side, side) + text(side / 2 - 5, side / 2 + 5, name, "white")
        film.elements.append(f'<g class="{film.moves(stops, goes + 1.0)} gone">{mark}</g>')
    for layer in range(layers):
        film.add(_labelled("known", f"x{layer + 1}", at, layer), scenes.found[layer] + 0.8)
    _signs(film, numbers, scenes)
    _words(film, numbers, scenes)
    positive, negative, _ = numbers.inertia
    description = (
        f"A network of {layers} layers. From the last layer to the first, each leaves the chain matrix and leaves a pivot behind; {positive} pivots are "
        f"positive and {negative} negative, as many as eigenvalues of H + {DAMPING:g} I. Then one pass from the first layer to the last gives the step."
    )
    return film.svg(900, 580, "The elimination of H + εI, stage by stage", description)


def _labelled(look: str, name: str, at: Sequence[float], layer: int) -> str:
    """A square with a name where a layer's parameters are."""
    corner, side = at[3 * layer], at[3 * layer + 1] - at[3 * layer]
    square = rect(look, LEFT + corner + 0.5, TOP + corner + 0.5, side - 1, side - 1)
    return group(square + text(LEFT + corner + side / 2 - 9, TOP + corner + side / 2 + 5, name, "white"))


def _matrix(film: Film, numbers: Told, at: Sequence[float], scenes: Scenes) -> None:
    """The blocks of each layer go when it is eliminated; where its parameters were, its pivot appears."""
    for layer in range(numbers.layers):
        own = [(i, j) for i, j in numbers.blocks if max(i, j) // 3 == layer]
        blocks = "".join(
            rect("xyz"[j % 3], LEFT + at[j] + 0.5, TOP + at[i] + 0.5, at[j + 1] - at[j] - 1, at[i + 1] - at[i] - 1)
            for i, j in own
        )
        film.add(group(blocks), 0.0, scenes.leaves[layer] + 1.5)
        film.add(_labelled("S", f"S{layer + 1}", at, layer), scenes.leaves[layer] + 1.5)
        corner, extent = at[3 * layer], at[3 * layer + 3] - at[3 * layer]
        frame = rect("frame", LEFT + corner, TOP + corner, extent, extent)
        film.add(group(frame), scenes.leaves[layer], scenes.leaves[layer] + 3.5)


def _signs(film: Film, numbers: Told, scenes: Scenes) -> None:
    """A row for each layer: a square for each pivot, coloured by its sign; then whether its part of the step is known."""
    film.add(text(RIGHT, 206, "pivots of each layer, by sign", "small faint"))
    for layer, (positive, negative) in enumerate(numbers.pivots):
        y = 222.0 + 40 * layer
        film.add(text(RIGHT, y + 13, f"layer {layer + 1}", "small"))
        squares = [*["plus"] * positive, *["minus"] * negative]
        wait = "".join(rect("wait", RIGHT + 56 + 9 * (k % 22), y + 9 * (k // 22), 7, 7) for k in range(len(squares)))
        film.elements.append(wait)
        full = "".join(rect(s, RIGHT + 56 + 9 * (k % 22), y + 9 * (k // 22), 7, 7) for k, s in enumerate(squares))
        film.add(
            group(full + text(RIGHT + 262, y + 13, f"+{positive}  -{negative}", "small")), scenes.leaves[layer] + 2.0
        )
        film.add(group(text(RIGHT + 56, y + 32, f"step x{layer + 1} known", "small known")), scenes.found[layer] + 0.8)
    total = numbers.inertia
    film.add(group(text(RIGHT, 482, f"together: {total[0]} positive, {total[1]} negative")), scenes.leaves[0] + BACK)


def _words(film: Film, numbers: Told, scenes: Scenes) -> None:
    """One caption at a time; the last one stays."""

    def caption(lines: Sequence[str], appears: float, goes: float | None) -> None:
        content = "".join(text(RIGHT, 76 + 22 * k, line) for k, line in enumerate(lines))
        film.add(group(content), appears, None if goes is None else goes - 0.7)

    positive, negative, _ = numbers.inertia
    first = [
        "The chain matrix K' of a network of",
        f"{numbers.layers} layers. A layer touches only the one",
        "before and the one after it.",
    ]
    caption(first, 0.0, OPENING)
    for layer in reversed(range(numbers.layers)):
        after = ["all that the layers before it will see of it", "is V, in one block of theirs."]
        lines = [f"Layer {layer + 1} is eliminated. Its pivot S{layer + 1} stays;"]
        lines += after if layer else ["it was the last, and only pivots are left."]
        caption(lines, scenes.leaves[layer], scenes.leaves[layer] + BACK)
    counts = [
        "The pivots have the signs of the eigenvalues",
        f"of H + {DAMPING:g} I (Sylvester): {positive} are positive and",
        f"{negative} negative. Nothing was estimated.",
    ]
    caption(counts, scenes.counted, scenes.counted + COUNTED)
    caption(
        [
            "Now forwards. The movement y of its inputs",
            "and its pivot tell each layer its own part",
            "of the step, and what moves behind it.",
        ],
        scenes.found[0],
        scenes.solved,
    )
    end = [
        f"(H + {DAMPING:g} I) x = g is solved, to twelve digits",
        "and more: one small factorization a layer,",
        "one pass back, one forth.",
    ]
    caption(end, scenes.solved, None)
    for k, (look, name) in enumerate((("x", "parameters x"), ("y", "activations y"), ("z", "backward signals z"))):
        x = LEFT + (0, 120, 245)[k]
        film.elements.append(rect(look, x, 556, 11, 11) + text(x + 17, 566, name, "small"))
    film.elements.append(rect("V", LEFT + 400, 556, 11, 11) + text(LEFT + 417, 566, "V", "small"))
    what = f"a tanh network of {sum(map(sum, numbers.pivots))} parameters on {BATCH} digits"
    film.add(text(RIGHT, 566, what, "small faint"))


def main() -> None:
    write_atomically(ROOT / "docs" / "elimination.svg", elimination(told()))
    deep = told(*DEEP)
    (ROOT / "docs" / "social.png").write_bytes(figures.social(deep.sizes, deep.blocks, deep.inertia, DAMPING))


if __name__ == "__main__":
    main()
