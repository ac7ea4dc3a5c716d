"""Operators for the tests of the checks: right ones, and ones with a known bug planted."""

import itertools

import torch


def spectral_extremes(a, cluster_rtol=1e-12):
    """Right: sigma_max and smallest nonzero sigma with the mean over each cluster as gradient."""
    u, s, vh = torch.linalg.svd(a.detach(), full_matrices=False)
    s = torch.where(s > 1e-13 * s[..., :1], s, torch.zeros_like(s))
    last = ((s > 0).sum(-1, keepdim=True) - 1).clamp(min=0)

    def part(target):
        member = ((s - target).abs() <= cluster_rtol * s[..., :1]) & (s > 0)
        weight = member.to(s.dtype)
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        slope = (u * weight.unsqueeze(-2)) @ vh
        value = (slope * a).sum((-1, -2))  # degree one: the value is <A, gradient>
        return value - value.detach() + torch.where(member.any(-1), target[..., 0], 0.0)

    return part(s[..., :1]), part(s.gather(-1, last))


class Planted(torch.autograd.Function):
    """sigma_max of a batch of matrices; subclasses change one thing."""

    @staticmethod
    def forward(a):
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        return s[..., 0].clone(), u[..., :1] @ vh[..., :1, :]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)


class ArbitraryVector(Planted):
    """Bug: one singular pair at a multiple extreme; and no graph through the saved pair."""

    @staticmethod
    def backward(ctx, grad, _):
        (pair,) = ctx.saved_tensors
        return grad[..., None, None] * pair


class ForgottenFactor(Planted):
    """Bug: sigma_max^2 with the gradient sigma u v^T; the factor 2 is lost."""

    @staticmethod
    def forward(a):
        value, pair = Planted.forward(a)
        return value**2, value[..., None, None] * pair

    backward = ArbitraryVector.backward


class Transposed(Planted):
    """Bug: v u^T in place of u v^T; right for symmetric matrices."""

    @staticmethod
    def backward(ctx, grad, _):
        (pair,) = ctx.saved_tensors
        return grad[..., None, None] * pair.mT


class FlushedToZero(Planted):
    """Bug: gradient entries below 1e-6 become zero; an absolute tolerance would not see it."""

    @staticmethod
    def forward(a):
        value, pair = Planted.forward(a)
        return value**2, 2 * value[..., None, None] * pair

    @staticmethod
    def backward(ctx, grad, _):
        (pair,) = ctx.saved_tensors
        return torch.where(pair.abs() < 1e-6, 0.0, grad[..., None, None] * pair)


class RefusesSecondOrder(Planted):
    """Right: as ArbitraryVector, but double backward raises."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        (pair,) = ctx.saved_tensors
        return grad[..., None, None] * pair


class SecondOrder(torch.autograd.Function):
    """Right: sigma_max with a backward made of differentiable operations."""

    @staticmethod
    def forward(a):
        return torch.linalg.svdvals(a)[..., 0].clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        u, _, vh = torch.linalg.svd(a, full_matrices=False)
        return grad[..., None, None] * (u[..., :1] @ vh[..., :1, :])


class StrideBlind(torch.autograd.Function):
    """Bug: a row-wise sum that reads memory as if its input were contiguous."""

    @staticmethod
    def forward(ctx, a):
        ctx.shape = a.shape
        return torch.as_strided(a, a.shape, torch.empty(a.shape).stride()).sum(-1)

    @staticmethod
    def backward(ctx, grad):
        return grad.unsqueeze(-1).expand(ctx.shape)


class CotangentStrideBlind(torch.autograd.Function):
    """Bug: the backward reads the incoming gradient as if it were contiguous."""

    @staticmethod
    def forward(ctx, a):
        return a * 3.0

    @staticmethod
    def backward(ctx, grad):
        flat = grad.new_zeros(grad.numel())
        storage = torch.as_strided(grad, (grad.untyped_storage().nbytes() // 8,), (1,), 0)
        count = min(flat.numel(), storage.numel())
        flat[:count] = storage[:count]
        return 3.0 * flat.reshape(grad.shape)


class WritesToArgument(torch.autograd.Function):
    """Bug: scales its argument in place as a work area."""

    @staticmethod
    def forward(ctx, a):
        total = a.sum(-1)
        a.detach().mul_(0.5)
        ctx.shape = a.shape
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad.unsqueeze(-1).expand(ctx.shape)


def detached_output(a):
    """Bug: the first output is right, the second one lost its graph."""
    s = torch.linalg.svdvals(a)
    return s[..., 0], s[..., -1].detach()


def scaled_by_the_whole_batch(a):
    """Bug: scales by the largest entry of the batch in place of each matrix."""
    scale = a.detach().abs().max() * 1.1
    return torch.linalg.matrix_norm(a / scale) * scale


def raises_for_a_zero_element(a):
    """Bug: one zero matrix takes the whole batch down."""
    norms = torch.linalg.matrix_norm(a)
    if bool((norms == 0).any()):
        raise ValueError("zero")
    return norms


_CALLS = itertools.count()


def depends_on_history(a):
    """Bug: the last bit changes from call to call."""
    return torch.linalg.matrix_norm(a) * (1.0 + 4e-16 * (next(_CALLS) % 2))


def jitter(a):
    """Bug: adds a constant to the value, which no derivative can see."""
    return torch.linalg.matrix_norm(a) + 1e-6


def gram_route(a):
    """Bug: sigma_min from the Gram matrix in the dtype of the input: kappa is squared."""
    return torch.linalg.eigvalsh(a.mT @ a)[..., 0].abs().sqrt()


def basis_dependent(a):
    """Bug: an entry of a singular vector, which turns with the matrix."""
    return torch.linalg.svd(a, full_matrices=False)[0][..., 0, 0].abs()


def not_contiguous(a):
    """Bug, where contiguous outputs are promised."""
    return (a * 2.0).mT.contiguous().mT


@torch.library.custom_op("immunize_ext_planted::cube_sum", mutates_args=())
def cube_sum(a: torch.Tensor) -> torch.Tensor:
    """Bug: an operator with register_autograd; forward mode is silently zero, func.grad raises."""
    return (a**3).sum((-1, -2))


@cube_sum.register_fake
def _(a):
    return a.new_empty(a.shape[:-2])


cube_sum.register_autograd(
    lambda ctx, grad: 3 * grad[..., None, None] * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class NoVmap(torch.autograd.Function):
    """Bug: no vmap rule."""

    @staticmethod
    def forward(a):
        return a.square().sum((-1, -2))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad[..., None, None] * ctx.saved_tensors[0]


class WrongVmap(NoVmap):
    """Bug: the vmap rule gives every sample the first one's result."""

    @staticmethod
    def vmap(info, in_dims, a):
        a = a.movedim(in_dims[0], 0)
        return NoVmap.apply(a)[:1].expand(info.batch_size), 0


def right_cube(a):
    """Right in every mode."""
    return (a**3).sum((-1, -2))
