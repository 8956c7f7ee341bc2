"""The blocks A, J, E, F, G of a stage, formed: linear and elementwise ones in closed form, any other by differentiating its module twice."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from hinv.shapes import Float
from hinv.vectors import flat, normal, seeded

from .skip import on_segments
from .stages import Derivatives, Stage


def derivatives(stage: Stage, wrt_input: bool = True) -> Derivatives:
    """First and contracted second derivatives of a stage; those in its input only if `wrt_input`.

    Linear and elementwise stages in closed form, anything else by torch.func in B (a_out + a_in) + p backward passes, vectorized; where torch.func has
    no vectorized rule for a module (PReLU, recurrent cells), sample by sample.
    """
    if stage.kind == "wiring":
        return _wiring(stage)
    return {"linear": _linear, "elementwise": _elementwise, "general": _general}[stage.kind](stage, wrt_input)


def on_the_state(stage: Stage, wrt_input: bool = True) -> Derivatives:
    """`derivatives` of the map of the whole state, of which a stage inside a residual block carries some entries (`network.skip`)."""
    D, c = derivatives(stage, wrt_input), stage.carry
    if not c or stage.kind == "wiring":
        return D
    pad = torch.nn.functional.pad
    J = pad(D.J, (0, 0, c, 0))
    if D.A is None or D.F is None or D.G is None:
        return Derivatives(J, D.E)
    A, G = D.A, D.G
    if A.ndim == 2:
        A, G = pad(A, (c, 0), value=1.0), pad(G, (c, 0))
    else:
        A, G = pad(A, (c, 0, c, 0)), pad(G, (c, 0, c, 0))
        A[:, :c, :c] = torch.eye(c, dtype=A.dtype, device=A.device)
    return Derivatives(J, D.E, A, pad(D.F, (c, 0)), G)


def _linear(stage: Stage, wrt_input: bool) -> Derivatives:
    """s_o = sum_i W_oi z_i + bias_o, at every position t:  A = W,  J dW = dW z,  F couples dW_oi with dz_i through b_o,  E = G = 0."""
    W, batch = stage.weight, len(stage.inputs)
    (a_out, a_in), positions = W.shape, len(stage.rows) // batch
    z, b, ones = (t.view(batch, positions, t.shape[1]) for t in (stage.rows, stage.signal, stage.ones))
    eye_out, eye_in, eye_T = (torch.eye(n, dtype=W.dtype, device=W.device) for n in (a_out, a_in, positions))
    J = torch.einsum("op,nti->ntopi", eye_out, z).reshape(batch, -1, a_out * a_in)
    if stage.has_bias:
        J = torch.cat([J, torch.einsum("op,nti->ntop", eye_out, ones).reshape(batch, -1, a_out)], dim=2)
    p, entries = J.shape[2], positions * a_in
    if not wrt_input:
        return Derivatives(J, W.new_zeros(p, p))
    F = W.new_zeros(batch, p, entries)
    F[:, : a_out * a_in] = torch.einsum("nto,ij->noitj", b, eye_in).reshape(batch, a_out * a_in, entries)
    A = torch.kron(eye_T, W).expand(batch, -1, -1)
    return Derivatives(J, W.new_zeros(p, p), A, F, W.new_zeros(batch, entries, entries))


def _wiring(stage: Stage) -> Derivatives:
    z, n = stage.inputs, sum(stage.segments)
    A = on_segments(stage.wiring.forth, torch.eye(n, dtype=z.dtype, device=z.device), stage.segments)
    J, E, F, G = (z.new_zeros(shape) for shape in ((len(z), len(A), 0), (0, 0), (len(z), 0, n), (len(z), n, n)))
    return Derivatives(J, E, A.expand(len(z), -1, -1), F, G)


def _elementwise(stage: Stage, wrt_input: bool) -> Derivatives:
    slope, bend = stage.slope, stage.bend
    batch, a = slope.shape
    J, E = slope.new_zeros(batch, a, 0), slope.new_zeros(0, 0)
    if not wrt_input:
        return Derivatives(J, E)
    return Derivatives(J, E, A=slope, F=slope.new_zeros(batch, 0, a), G=bend)


def _general(stage: Stage, wrt_input: bool) -> Derivatives:
    try:
        result = _vectorized(stage, wrt_input)
        check_against_autograd(stage, result)
    except (RuntimeError, NotImplementedError):  # torch.func has no rule, or a wrong one
        result = _sample_by_sample(stage, wrt_input)
        check_against_autograd(stage, result)
        check_symmetry(stage, result)
    return result


def _vectorized(stage: Stage, wrt_input: bool) -> Derivatives:
    f, x, z, b = stage.per_sample, stage.x, stage.inputs, stage.b.flatten(1)
    batch, p, a_in = len(z), len(x), z[0].numel()

    def phi(x: Tensor, z: Tensor, b: Tensor) -> Tensor:
        return f(x, z) @ b

    def total(x: Tensor) -> Tensor:
        return vmap(phi, in_dims=(None, 0, 0))(x, z, b).sum()

    def over_samples(function: Callable[..., Tensor]) -> Tensor:
        return vmap(function, in_dims=(None, 0, 0))(x, z, b)

    has_parameters = p > 0  # torch.func differentiates nothing with respect to an empty tensor
    J = vmap(jacrev(f), in_dims=(None, 0))(x, z) if has_parameters else z.new_zeros(batch, b.shape[1], 0)
    E = jacrev(grad(total))(x) if has_parameters else z.new_zeros(0, 0)
    if not wrt_input:
        return Derivatives(J, E)
    F = z.new_zeros(batch, 0, a_in)
    if has_parameters:
        # the gradient in z differentiated in x: a_in backward passes a sample, where the other order takes p
        F = over_samples(jacrev(grad(phi, argnums=1), argnums=0)).reshape(batch, a_in, p).mT
    A = vmap(jacrev(f, argnums=1), in_dims=(None, 0))(x, z).reshape(batch, -1, a_in)
    G = over_samples(jacrev(grad(phi, argnums=1), argnums=1)).reshape(batch, a_in, a_in)
    return Derivatives(J, E, A, F, G)


def _sample_by_sample(stage: Stage, wrt_input: bool) -> Derivatives:
    """The same by plain double backward, one row at a time: B (a_out + p + a_in) backward passes of one sample."""
    p, E, samples = len(stage.x), stage.inputs.new_zeros(len(stage.x), len(stage.x)), []
    for n, b in enumerate(stage.b.flatten(1)):
        z = stage.inputs[n : n + 1].detach().requires_grad_()
        leaves = [*stage.parameters.values(), z]

        def rows(of: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
            """The derivative of every entry of a flat tensor, in the parameters and the input."""
            if not of.requires_grad:
                return of.new_zeros(len(of), sum(leaf.numel() for leaf in leaves))
            return torch.stack([flat(grads(entry, leaves)) for entry in of.unbind()])

        with torch.enable_grad():
            out = stage.module(z.clone()).flatten()
            first = torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(out @ b, leaves, create_graph=True, materialize_grads=True)]
            )
            first = first if wrt_input else first[:p]
        jacobian, second = rows(out), rows(first)
        E += second[:p, :p]
        samples.append((jacobian[:, :p], jacobian[:, p:], second[:p, p:], second[p:, p:]))
    J, A, F, G = (torch.stack(blocks) for blocks in zip(*samples, strict=True))
    return Derivatives(J, E, A, F, G) if wrt_input else Derivatives(J, E)


def grads(of: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(of, leaves, retain_graph=True, materialize_grads=True)


def check_against_autograd(stage: Stage, D: Derivatives) -> None:
    """One random second-order product of the blocks against plain double backward.

    Not idle: in torch 2.14 torch.func.hessian of a LayerNorm is wrong in the first digit (its weight against its input), while
    double backward is right. A wrong block must not pass for a curvature.

    Raises:
        RuntimeError: naming the stage.
    """
    generator = seeded(0)
    leaves, out = leaves_and_output(stage)
    z = leaves[-1]
    with torch.enable_grad():
        first = torch.autograd.grad((out * stage.b).sum(), leaves, create_graph=True, materialize_grads=True)
    moves = [normal(t.shape, t, generator) for t in leaves]
    if D.A is None:
        moves[-1].zero_()
    p, v_x, v_z = D.J.shape[2], flat(moves[:-1], z), moves[-1].flatten(1)
    both = second_product(first, leaves, moves)
    second, second_z = both[:p], both[p:].view_as(v_z)
    pairs = [(D.J.flatten(0, 1).T @ stage.b.flatten(), flat(first[:-1], z))]
    if D.A is None:
        pairs.append((D.E @ v_x, second))
    else:
        assert D.F is not None and D.G is not None
        pairs.append((torch.einsum("noi,no->ni", D.A, stage.b.flatten(1)), first[-1].flatten(1)))
        pairs.append((D.E @ v_x + torch.einsum("npi,ni->p", D.F, v_z), second))
        pairs.append((torch.einsum("npi,p->ni", D.F, v_x) + torch.einsum("nij,nj->ni", D.G, v_z), second_z))
    agree(stage, pairs)


NOT_SYMMETRIC = (
    f"its second derivative by autograd is not symmetric, so it is wrong (torch {torch.__version__}); or rounding errors are all there is of it, as behind "
    "a normalization of two units: float64 and smaller weights help"
)


def check_symmetry(stage: Stage, D: Derivatives) -> None:
    """Of blocks that nothing but autograd vouches for.

    Raises:
        RuntimeError: naming the stage.
    """
    for block in (D.E, D.G):
        if block is not None and not (block - block.mT).norm() <= torch.finfo(block.dtype).eps ** 0.5 * block.norm():
            raise RuntimeError(f"{stage}: {NOT_SYMMETRIC}")


CONTRADICTED = (
    "by autograd its derivative forwards is not the transpose of the one backwards: an input lies exactly at a kink, as zero does for PReLU, where there is "
    "no derivative"
)


def check_twice(stage: Stage) -> None:
    """Derivatives of a general module are there, the first ones the same in both directions, and the second ones symmetric (on its first two samples), by
    products with random vectors: no block is formed. Not idle: in torch 2.14 double backward through weight_norm is wrong, and not symmetric.

    Raises:
        ValueError: naming the stage, with torch's reason.
    """
    few = dataclasses.replace(stage, inputs=stage.inputs[:2], outputs=stage.outputs[:2], b=stage.b[:2])
    generator = seeded(0)
    try:
        leaves, out = leaves_and_output(stage)
        moves, signal = [normal(t.shape, t, generator) for t in leaves], normal(out.shape, out, generator)
        with torch.enable_grad():
            u = signal.clone().requires_grad_()  # the product of signal and derivative is linear in it
            back = torch.autograd.grad(out, leaves, u, create_graph=True, materialize_grads=True)
            inner = sum(((g * w).sum() for g, w in zip(back, moves, strict=True)), start=out.new_zeros(()))
            (forth,) = torch.autograd.grad(inner, u, materialize_grads=True)
        size = flat(back).norm() * flat(moves).norm()
        if not abs((inner - (forth * signal).sum()).item()) <= torch.finfo(out.dtype).eps ** 0.5 * size.item():
            raise RuntimeError(CONTRADICTED)
        leaves, out = leaves_and_output(few)
        with torch.enable_grad():
            first = torch.autograd.grad((out * few.b).sum(), leaves, create_graph=True, materialize_grads=True)
        u, v = ([normal(t.shape, t, generator) for t in leaves] for _ in range(2))
        Su, Sv = second_product(first, leaves, u), second_product(first, leaves, v)
        size = (Su.norm() * flat(v).norm() + Sv.norm() * flat(u).norm()).item()
        # of a module that is linear, rounding is all there is of its second derivative
        eps = torch.finfo(out.dtype).eps
        rounding = 1e3 * eps * (flat(first).norm() * flat(u).norm() * flat(v).norm()).item()
        if not abs((flat(u) @ Sv - flat(v) @ Su).item()) <= eps**0.5 * size + rounding:
            raise RuntimeError(NOT_SYMMETRIC)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{stage} cannot be differentiated twice; write it with elementary operations. torch says: {error}"
        ) from error


def leaves_and_output(stage: Stage) -> tuple[list[Tensor], Tensor]:
    z = stage.inputs.detach().requires_grad_()
    with torch.enable_grad():
        return [*stage.parameters.values(), z], stage.module(z.clone())


def second_product(first: Sequence[Tensor], leaves: list[Tensor], moves: list[Tensor]) -> Float[Tensor, " n"]:
    """The derivative of first derivatives along a move, in all leaves, flat; of those that do not depend on them it is zero."""
    live = [(g, w) for g, w in zip(first, moves, strict=True) if g.requires_grad]
    if not live:
        return flat(torch.zeros_like(t) for t in leaves)
    functions, weights = [g for g, _ in live], [w for _, w in live]
    return flat(torch.autograd.grad(functions, leaves, weights, retain_graph=True, materialize_grads=True))


def of_float32(error: float, scale: float, dtype: torch.dtype) -> str:
    """What to say where a float64 difference has the size of float32 rounding."""
    if dtype != torch.float64 or not 0 < error <= 1e-4 * scale:
        return ""
    return " The difference has the size of float32 rounding: something may compute in float32 inside (.float()); let it follow the dtype of its input."


def agree(stage: Stage, pairs: list[tuple[Tensor, Tensor]]) -> None:
    scale = max(reference.abs().max().item() if reference.numel() else 0.0 for _, reference in pairs)
    tolerance = torch.finfo(stage.inputs.dtype).eps ** 0.5 * scale
    for ours, reference in pairs:
        error = (ours - reference).abs().max().item() if ours.numel() else 0.0
        if not error <= tolerance:
            raise RuntimeError(
                f"{stage}: torch.func and autograd disagree about its derivatives, so one of them is wrong for this module "
                f"(torch {torch.__version__}); write the module with elementary operations.{of_float32(error, scale, stage.inputs.dtype)}"
            )


def fuse(inner: Derivatives, outer: Derivatives) -> Derivatives:
    """Derivatives of outer(inner(z; x)): the chain rule to second order. `outer` has no parameters, `inner` has some.

    A = A2 A1,  J = A2 J1,  E = E1 + J1^T G2 J1,  F = F1 + J1^T G2 A1,  G = G1 + A1^T G2 A1.
    """
    assert outer.A is not None and outer.G is not None  # it has an input: the inner stage
    GJ = _times(outer.G, inner.J)  # (B, a, p)
    E = inner.E + inner.J.flatten(0, 1).T @ GJ.flatten(0, 1)
    J = _times(outer.A, inner.J)
    if inner.A is None:
        return Derivatives(J, E)
    assert inner.F is not None and inner.G is not None
    G = inner.G + inner.A.mT @ _times(outer.G, inner.A)
    return Derivatives(J, E, _times(outer.A, inner.A), inner.F + GJ.mT @ inner.A, G)


def _times(matrix: Float[Tensor, "B ..."], other: Float[Tensor, "B a n"]) -> Float[Tensor, "B m n"]:
    """matrix @ other per sample, where matrix is (B, m, a) or the diagonal (B, a)."""
    return matrix.unsqueeze(2) * other if matrix.ndim == 2 else matrix @ other
