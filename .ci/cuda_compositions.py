"""What the CUDA build composes of torch operators, run on CPU tensors and compared with the CPU.

Symmetric extremes and the library route of the preconditioned gradient hold no
kernel of ours, so the function registered for CUDA can be called on any tensor: no GPU is needed.
Run by cuda_build.py with the Python of the CUDA environment and the built package in its path.
"""

import sys

import torch
from torch import Tensor

import immunize_ext.ops  # noqa: F401  registers the operators

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
RTOL = 1e-9  # both routes are backward stable, and the inputs have gaps of 1e-2 and more


def compare(what: str, operator: str, *arguments: object) -> None:
    """Call the functions of both devices; exit where they differ in value, shape or dtype."""
    call = getattr(torch.ops.immunize_ext, operator).default.redispatch
    expected, got = (call(keys, *arguments) for keys in (CPU, CUDA))
    pairs = zip(
        (expected,) if isinstance(expected, Tensor) else expected,
        (got,) if isinstance(got, Tensor) else got,
        strict=True,
    )
    for number, (right, ours) in enumerate(pairs):
        if ours.shape != right.shape or ours.dtype != right.dtype:
            sys.exit(f"cuda_compositions: {operator}, {what}, output {number}: other shape or type")
        right, ours = right.double(), ours.double()
        if operator == "symmetric_extremes" and number >= 4:  # vectors: up to sign
            right, ours = (v.unsqueeze(-1) * v.unsqueeze(-2) for v in (right, ours))
        error = float((ours - right).abs().max()) if right.numel() else 0.0
        scale = max(float(right.abs().max()) if right.numel() else 0.0, 1e-300)
        if not error <= RTOL * scale:
            sys.exit(f"cuda_compositions: {operator}, {what}, output {number}: off by {error:.1e}")
    print(f"  {operator}: {what}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refused(what: str, operator: str, *arguments: object) -> None:
    """Both devices must refuse, in the same words."""
    call = getattr(torch.ops.immunize_ext, operator).default.redispatch
    messages = []
    for keys in (CPU, CUDA):
        try:
            call(keys, *arguments)
        except (ValueError, NotImplementedError) as error:
            messages.append(str(error).partition(", got")[0].partition(" (")[0])
    if len(messages) != 2 or messages[0] != messages[1]:
        sys.exit(f"cuda_compositions: {operator}, {what}: refusals differ: {messages}")
    print(f"  {operator}: {what}: refused alike")


def symmetric() -> None:
    """Values, multiplicities, vectors and the derivative of indefinite matrices."""
    rtol = 1e-12
    basis, _ = torch.linalg.qr(normal(2, 6, 6))
    for eigenvalues in (
        [-3.0, -1.0, 0.5, 1.0, 2.0, 4.0],
        [1e-3, 1.0, 1.1, 1.2, 1.3, 2.0],
        [-2.0, -2.0, 0.0, 1.0, 3.0, 3.0],
    ):
        values = torch.tensor(eigenvalues, dtype=torch.float64)
        h = (basis * values) @ basis.mT
        h = (h + h.mT) / 2
        cluster = eigenvalues[0] == eigenvalues[1]
        for scale in (1.0, 2.0**-300, 2.0**300):
            what = f"{eigenvalues}, scale {scale:.0e}"
            name = "symmetric_extremes"
            forward = torch.ops.immunize_ext.symmetric_extremes(h * scale, rtol)
            if not cluster:
                compare(what, name, h * scale, rtol)
            g = [normal(2, seed=1), normal(2, seed=2)]
            compare(what, f"{name}_backward", *g, h * scale, *forward[2:], rtol)
    compare("float32", "symmetric_extremes", torch.diag(torch.tensor([1.0, -2.0, 5.0])), 1e-5)
    compare("empty", "symmetric_extremes", normal(0, 4, 4), rtol)
    refused("not symmetric", "symmetric_extremes", normal(2, 4, 4), rtol)
    bad = torch.full((2, 3, 3), torch.inf, dtype=torch.float64)
    refused("infinity", "symmetric_extremes", bad, rtol)


def large_symmetric() -> None:
    """Sides where Krylov spaces search and a factorisation proves, with every way to fall back."""
    t, rtol = 1030, 1030 * torch.finfo(torch.float64).eps
    basis, _ = torch.linalg.qr(normal(t, t, seed=5))

    def spectrum(low: list[float], high: list[float], start: float, end: float) -> Tensor:
        inner = torch.linspace(start, end, t - len(low) - len(high), dtype=torch.float64)
        ends = (torch.tensor(e, dtype=torch.float64) for e in (low, high))
        first, last = ends
        return torch.cat([first, inner, last])

    graded = torch.logspace(-4, 0, t, dtype=torch.float64)
    batches = {
        "graded, negative, indefinite": [graded, -graded.flip(0), spectrum([-1.0], [], -0.9, 2.0)],
        "repeated ends, an outlier": [
            spectrum([0.5] * 3, [3.0] * 2, 1.0, 2.0),
            spectrum([], [50.0], 1.0, 1.5),
        ],
        "a proven one beside a null space and one value": [
            graded,
            spectrum([0.0] * 600, [], 1.0, 2.0),
            torch.ones(t, dtype=torch.float64),
            torch.zeros(t, dtype=torch.float64),
        ],
    }
    name = "symmetric_extremes"
    call = getattr(torch.ops.immunize_ext, name).default.redispatch
    for what, spectra in batches.items():
        h = torch.stack([(basis * values) @ basis.mT for values in spectra])
        h = (h + h.mT) / 2
        forward = call(CUDA, h, rtol)
        for number, values in enumerate(spectra):
            size = float(values.abs().max())
            error = max(
                abs(float(forward[0][number] - values.max())),
                abs(float(forward[1][number] - values.min())),
            )
            if not error <= 8 * t * torch.finfo(torch.float64).eps * size:
                sys.exit(f"cuda_compositions: {name}, {what}, matrix {number}: off by {error:.1e}")
            counts = [int((values == end).sum()) for end in (values.max(), values.min())]
            if [int(forward[2][number]), int(forward[3][number])] != counts:
                sys.exit(f"cuda_compositions: {name}, {what}, matrix {number}: other counts")
            for vector, value in ((forward[4], forward[0]), (forward[5], forward[1])):
                v = vector[number]
                residual = float((h[number] @ v - value[number] * v).norm())
                if not residual <= 8 * t * torch.finfo(torch.float64).eps * size:
                    sys.exit(f"cuda_compositions: {name}, {what}, matrix {number}: other vectors")
        again = call(CUDA, h, rtol)
        if not all(torch.equal(a, b) for a, b in zip(forward, again, strict=True)):
            sys.exit(f"cuda_compositions: {name}, {what}: two calls differ")
        print(f"  {name}, side {t}: {what}")


def large_features() -> None:
    """Sides where the thin Gram matrix is searched: simple extremes, proven without a kernel."""
    t, k, eps = 1030, 1060, torch.finfo(torch.float64).eps
    u, _ = torch.linalg.qr(normal(t, t, seed=5))
    v, _ = torch.linalg.qr(normal(k, t, seed=6))
    spectra = [
        torch.linspace(1.0, 0.1, t, dtype=torch.float64),
        torch.logspace(0, -3, t, dtype=torch.float64),
        # Kappa 1e5; graded all the way down, the Gram matrix could not tell the last two apart.
        torch.cat([torch.logspace(0, -3, t - 1, dtype=torch.float64), torch.tensor([1e-5])]),
    ]
    scales = [1.0, 2.0**-300, 2.0**300]
    a = torch.stack([(u * sigma) @ v.mT * c for sigma, c in zip(spectra, scales, strict=True)])
    bound = 8 * (t + k) ** 0.5 * eps
    for tall in (False, True):
        for gram in (False, True):
            x = (a.mT if tall else a).contiguous()
            if gram:
                x = x[:2]  # the square of 2^300 squared would overflow in |K|_F^2
            name = "gram_extremes" if gram else "extremal_singular_values"
            call = getattr(torch.ops.immunize_ext, name).default.redispatch
            found = list(call(CUDA, x, k * eps, k * eps, False))
            if gram:
                thin = x @ x.mT if not tall else x.mT @ x
                for field, right in ((10, thin), (2, thin.square().sum((1, 2)))):
                    if not torch.allclose(found[field], right, rtol=1e-12, atol=0):
                        sys.exit(f"cuda_compositions: {name}, output {field} is off")
                found = [found[0].sqrt(), found[1].sqrt(), *found[3:10]]
            for number in range(len(x)):
                sigma, c = spectra[number], scales[number]
                what = f"{name}, tall {tall}, matrix {number}"
                if [int(f[number]) for f in found[2:5]] != [t, 1, 1]:
                    sys.exit(f"cuda_compositions: {what}: rank or multiplicities")
                for value, left, right, truth in (
                    (found[0], found[5], found[6], sigma[0]),
                    (found[1], found[7], found[8], sigma[-1]),
                ):
                    m, s = x[number] / c, value[number] / c
                    one, two = left[number], right[number]
                    errors = [
                        float((s - truth).abs()),
                        float((m @ two - s * one).norm()),
                        float((m.mT @ one - s * two).norm()),
                    ]
                    if not max(errors) <= bound:
                        sys.exit(f"cuda_compositions: {what}: {errors} beyond {bound:.1e}")
            print(f"  {name}, {'1060 x 1030' if tall else '1030 x 1060'}: proven and refined")
    short = torch.ops.immunize_ext.gram_extremes.default.redispatch(
        CUDA, a[:1], k * eps, k * eps, True
    )
    if float(short[1]) != 0.0 or int(short[5]) != k - t or bool(short[8].any()):
        sys.exit("cuda_compositions: gram_extremes, full rank of fewer samples than features")
    bad = torch.stack([a[0], a[0]])
    bad[1, 3, 4] = torch.nan
    refused("NaN in large features", "extremal_singular_values", bad, k * eps, k * eps, False)


def precondition() -> None:
    """The library route, with more rows than one call of the library takes."""
    x = normal(8, 20)
    q, r = torch.linalg.qr(x.mT)
    basis, chol = q.mT, torch.linalg.cholesky(r @ r.mT + 0.1 * torch.eye(8, dtype=torch.float64))
    full = torch.linalg.cholesky(x.mT @ x + 0.1 * torch.eye(20, dtype=torch.float64))
    grad = normal(2, 7, 20, seed=1)
    compare("few samples", "precondition", grad, chol, basis, 0.1)
    compare("Cholesky", "precondition", grad, full, x[:0], 0.1)
    compare("many rows", "precondition", normal(70000, 20, seed=2), full, x[:0], 0.1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    symmetric()
    large_symmetric()
    large_features()
    precondition()
