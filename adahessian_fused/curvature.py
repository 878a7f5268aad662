"""What the backward passes of a step leave for its update: Hessian-vector products, or their averaged diagonal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor

from . import hvp
from .bucket import Bucket, Entry, by_bucket
from .distributed.sharded import joined, part_of
from .reference import block_mean, rademacher_signs
from .segments import Segment, Steps, altered, averages_nothing, of_logical_order

_DTYPE, _FIRST = attrgetter("dtype"), attrgetter("first")
_BUCKETS_DTYPE, _ORDER = attrgetter("bucket.dtype"), attrgetter("order")
_OWNER, _PARAM = attrgetter("owner"), attrgetter("param")


Memory = dict[tuple[torch.device, torch.dtype, int], Tensor]  # flat buffers


def draw_probe(
    entries: Sequence[Entry],
    backends: Mapping[str, Any],
    *,
    probe: str,
    seed: int,
    sample: int,
    memory: Memory | None = None,
) -> dict[Entry, Tensor]:
    """Draw the probe z of each parameter, in its shape and dtype.

    Args:
        entries: the parameters.
        backends: the backend of each device type.
        probe: "rademacher" or "gaussian".
        seed: Philox key.
        sample: number of the probe within the step.
        memory: where to draw it again, as the last draw has left it; a CUDA graph reads it there.
    """
    z: dict[Entry, Tensor] = {}
    used = {}
    for bucket, members in by_bucket(entries).items():
        size = bucket.device, bucket.dtype, bucket.numel
        flat = None if memory is None else memory.pop(size, None)
        if flat is None:
            flat = torch.empty(bucket.numel, dtype=bucket.dtype, device=bucket.device)
        used[size] = flat
        if probe == "rademacher" and 0 in map(_FIRST, members):
            draw = backends[bucket.device.type].rademacher
            getattr(draw, "_op", draw)(flat, bucket.table_of(members), bucket.steps, seed, sample)
        if drawable(members, probe):
            z |= zip(members, bucket.views(flat, members), strict=True)
            continue
        elif probe == "gaussian":
            generator, counts = torch.Generator(bucket.device), bucket.steps[:, Steps.HESSIAN_STEP].tolist()
            for entry in members:
                # A stream for each parameter, update and sample: the same z whoever is drawn beside it, and in a run
                # that was resumed.
                generator.manual_seed(mixed(seed, counts[entry.row], sample, entry.param_id))
                bucket.logical_view(flat, entry).normal_(generator=generator)
        for entry in members:
            # Gaussian numbers in logical order: the same probe in any memory format.
            z[entry] = bucket.view(flat, entry) if probe == "rademacher" else bucket.logical_view(flat, entry)
            if probe == "rademacher" and entry.first != 0:  # which the ops do not draw
                h, whole = bucket.steps[entry.row, Steps.HESSIAN_STEP].to(bucket.device), entry.first is None
                numel = entry.owner.numel() if whole else entry.param.numel()
                signs = rademacher_signs(numel, entry.param_id, h, seed, sample, entry.first or 0)
                part = part_of(signs.view(entry.owner.shape), entry.owner) if whole else signs
                z[entry].copy_(part.reshape(entry.param.shape))
    if memory is not None:
        memory |= used
    return z


def drawable(entries: Iterable[Entry], probe: str) -> bool:
    """Tell whether the ops can draw the probe of these parameters themselves.

    What this rank has of each then begins with the parameter's first element, as all of it does.
    """
    return probe == "rademacher" and set(map(_FIRST, entries)) <= {0}


def initial_seed() -> int:
    """Return the probe's key where none is given: the seed of PyTorch's generator, which is left alone."""
    return torch.initial_seed() % 2**63


def mixed(*words: int) -> int:
    """Mix words to 63 bits, each of which, the low 32 of a CPU generator too, depends on every word (splitmix64)."""
    state, mask = 0, 2**64 - 1
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


class Curvature:
    """Accumulates the curvature of one step.

    A single backward pass leaves its Hz as it is, and the update multiplies and averages it on the fly. Further
    micro-batches and samples are folded into the compact diagonal (Eq. 6, 7), d / b numbers in all.

    Args:
        backends: the backend of each device type.
        seed: Philox key.
    """

    def __init__(self, backends: Mapping[str, Any], seed: int) -> None:
        self._backends, self.seed = backends, seed
        self.products: dict[Entry, Tensor] = {}
        self.sample = 0
        self.is_hvp = True
        self.diags: dict[Bucket, Tensor] = {}
        self.unscaled = False  # of GradScaler's factor
        self.reported = False  # to GradScaler, if it is not finite

    def draw(self, entries: Sequence[Entry], *, probe: str, sample: int) -> dict[Entry, Tensor]:
        """Draw the probe z of each parameter, see :func:`draw_probe`."""
        return draw_probe(entries, self._backends, probe=probe, seed=self.seed, sample=sample)

    def take(
        self,
        products: dict[Entry, Tensor],
        *,
        probe: str,
        n_samples: int,
        sample: int,
        z: Mapping[Entry, Tensor] | None = None,
        weight: float = 1.0,
        inverse_scale: Tensor | None = None,
    ) -> None:
        """Take in Hz along one of this step's probes, however it was computed.

        Args:
            products: Hz of each parameter.
            probe: "rademacher" or "gaussian".
            n_samples: probes to average.
            sample: number of this one.
            z: the probe, if it is at hand.
            weight: factor on Hz.
            inverse_scale: factor that takes GradScaler's scale out of Hz.
        """
        if not products:
            return
        if inverse_scale is not None:
            products, self.unscaled = _scaled(products, inverse_scale), True
        if weight != 1.0:  # not in place: autograd may have handed out one tensor twice
            products = dict(zip(products, torch._foreach_mul(list(products.values()), weight), strict=True))
        is_hvp = drawable(products, probe)
        if not is_hvp and z is None:
            z = draw_probe(list(products), self._backends, probe=probe, seed=self.seed, sample=sample)
        orders, tensors = set(map(_ORDER, products)), products.values()
        if not is_hvp:
            products = {entry: entry.product(z[entry], h) for entry, h in products.items()}
        elif not (orders == {(1, 1)} and all(map(Tensor.is_contiguous, tensors))):
            products = {entry: entry.stored(h, h.dtype) for entry, h in products.items()}
        self.add(products, sample=sample, is_hvp=is_hvp, weight=1 / n_samples)

    def add(self, products: dict[Entry, Tensor], *, sample: int, is_hvp: bool, weight: float = 1.0) -> None:
        """Take in Hz (or D itself, if not ``is_hvp``) of one backward pass and probe; ``weight`` is 1 / n_samples."""
        self.reported = False
        matches = all(map(eq, map(_DTYPE, products.values()), map(_BUCKETS_DTYPE, products)))
        if not self.products and not self.diags and weight == 1.0 and matches:
            self.products, self.sample, self.is_hvp = products, sample, is_hvp
            return
        self.fold()
        self._fold(products, sample, is_hvp, weight)

    def plus(self, other: Curvature) -> Curvature:
        """Add up both; if anything goes wrong, both are as they were."""
        if not (other.products or other.diags):
            return self
        if not (self.products or self.diags):
            return other
        if self.unscaled != other.unscaled:
            raise RuntimeError(
                "opt.backward() was given a grad_scaler for some losses of this step, but not for all; expected it for "
                "all of them, or scaler.scale(loss) for all of them"
            )
        total = Curvature(self._backends, self.seed)
        total.unscaled = self.unscaled
        total.diags = {bucket: diag.clone() for bucket, diag in self.diags.items()}
        for part in (self, other):
            total._fold(part.products, part.sample, part.is_hvp, 1.0)
        for bucket, diag in other.diags.items():
            total.diags[bucket] = total.diags[bucket].add_(diag) if bucket in total.diags else diag
        return total

    def without(self, entries: Iterable[Entry]) -> Curvature:
        """Return the curvature of all other parameters."""
        gone = set(entries)
        rest = Curvature(self._backends, self.seed)
        rest.sample, rest.is_hvp, rest.unscaled = self.sample, self.is_hvp, self.unscaled
        rest.products = {entry: h for entry, h in self.products.items() if entry not in gone}
        rest.diags = {bucket: diag.clone() for bucket, diag in self.diags.items()}
        for entry in gone:
            if entry.bucket in rest.diags:
                view = entry.bucket.logical_view if entry.bucket.averages_magnitudes else entry.bucket.diag_view
                view(rest.diags[entry.bucket], entry).zero_()
        return rest

    def unscale(self, inverse_scale: Tensor) -> None:
        """Take GradScaler's factor out of everything that has been taken in, unless it is out already."""
        if self.unscaled:
            return
        # Through add(), which folds products that are no longer in their parameters' dtype.
        products, self.products = _scaled(self.products, inverse_scale), {}
        for diag in self.diags.values():
            diag.mul_(inverse_scale.to(diag.device))
        if products:
            self.add(products, sample=self.sample, is_hvp=self.is_hvp)
        self.unscaled = True

    def found_inf(self) -> Tensor:
        """Return a float32 scalar that is 0 if all of the curvature is finite."""
        held: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in (*self.products.values(), *self.diags.values()):
            held.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        flags = []
        for (device, _), tensors in held.items():
            flag = torch.zeros((), dtype=torch.float32, device=device)
            one = torch.ones_like(flag)
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, flag, one)
            flags.append(flag)
        none = torch.zeros((), dtype=torch.float32, device="cpu")
        total = sum(flag.to(flags[0].device) for flag in flags) if flags else none
        return total  # type: ignore[return-value]

    def nonfinite(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return those of some parameters whose curvature is infinite or NaN anywhere."""
        if self.found_inf() == 0:
            return []
        held = [(e, [self.products[e]] if e in self.products else []) for e in entries]
        if self.diags:
            for (_, tensors), numbers in zip(held, self.numbers(entries), strict=True):
                tensors.append(numbers)
        return [entry for entry, tensors in held if not all(tensor.isfinite().all() for tensor in tensors)]

    def report(self, grads: Sequence[Tensor], agree: Callable[[Tensor], Tensor] | None = None) -> None:
        """Make a gradient infinite if the curvature is not finite: GradScaler looks at gradients only.

        Args:
            grads: the gradients.
            agree: makes of this rank's flag the one of all ranks.
        """
        smallest = min((grad for grad in grads if grad.numel()), key=Tensor.numel, default=None)
        if smallest is None or (self.reported and agree is None):
            return
        found_inf = self.found_inf().to(smallest.device)
        found_inf = found_inf if agree is None else agree(found_inf)
        smallest.add_(torch.where(found_inf > 0, torch.inf, 0.0).to(smallest))
        self.reported = True

    @property
    def folded(self) -> bool:
        """Whether the curvature is in compact diagonals."""
        return bool(self.diags)

    def must_fold(self, buckets: Iterable[Bucket]) -> bool:
        """Tell whether the update needs the compact diagonal: some of it is folded, or kept for stale steps."""
        return bool(self.diags) or any([bucket.diag is not None for bucket in buckets])  # noqa: C419  faster

    def numbers(self, entries: Sequence[Entry]) -> list[Tensor]:
        """Return views of each parameter's part of the folded curvature; zeros if nothing has been taken in.

        Its block means; or D itself, if magnitudes are to be averaged.
        """
        self.fold()
        views = []
        for entry in entries:
            bucket, fine = entry.bucket, entry.bucket.averages_magnitudes
            if bucket not in self.diags:
                self.diags[bucket] = bucket.new_flat() if fine else bucket.new_diag()
            flat = self.diags[bucket]
            views.append(bucket.logical_view(flat, entry) if fine else bucket.diag_view(flat, entry))
        return views

    def fold(self) -> None:
        """Turn pending products into the compact diagonal; an error leaves those that it has not got."""
        for members in by_bucket(list(self.products)).values():
            products = {entry: self.products[entry] for entry in members}
            self._fold(products, self.sample, self.is_hvp, 1.0)
            self.products = {entry: h for entry, h in self.products.items() if entry not in products}

    def _fold(self, products: dict[Entry, Tensor], sample: int, is_hvp: bool, weight: float) -> None:
        for bucket, members in by_bucket(list(products)).items():
            fine = bucket.averages_magnitudes
            if bucket not in self.diags:
                self.diags[bucket] = bucket.new_flat() if fine else bucket.new_diag()
            table = bucket.table_of(members)
            self._backends[bucket.device.type].hessian_diag(
                [entry.stored(products[entry], products[entry].dtype) for entry in members],
                self.diags[bucket],
                altered(table, averages_nothing) if fine else table,
                bucket.steps,
                seed=self.seed,
                sample=sample,
                is_hvp=is_hvp,
                scale=weight,
                accumulate=True,
            )

    def hessians(self, entries: Sequence[Entry]) -> list[Tensor]:
        """Return Hz of some parameters, as it came; zeros for parameters that are linear in the loss."""
        products = list(map(self.products.get, entries))
        if any(map(is_, products, repeat(None))):
            products = [
                torch.zeros_like(entry.param) if h is None else h for entry, h in zip(entries, products, strict=True)
            ]
        return products

    def diag(self, bucket: Bucket) -> Tensor:
        """Return the compact diagonal of a bucket, after :meth:`fold`."""
        folded = self.diags.get(bucket)
        if folded is None:
            return bucket.new_diag()
        if not bucket.averages_magnitudes:
            return folded
        # D is complete only now, so only now can its magnitudes be averaged.
        compact, table = bucket.new_diag(), altered(bucket.segments, of_logical_order)
        flat = [folded[r[Segment.OFFSET] : r[Segment.OFFSET] + r[Segment.NUMEL]] for r in bucket.rows]
        self._backends[bucket.device.type].hessian_diag(
            flat, compact, table, bucket.steps, seed=0, sample=0, is_hvp=False, scale=1.0, accumulate=False
        )
        return compact

    def follow(self, pairs: Sequence[tuple[Entry, Entry]]) -> Callable[[], None]:
        """Prepare for parameters that are laid out anew; what is returned completes it.

        Args:
            pairs: old and new entry of each parameter; the old ones will become what the new ones are.

        Raises:
            RuntimeError: a parameter's diagonal has been averaged in another way than its new entry asks for.
        """
        if any(old.probe_words() != new.probe_words() for old, new in pairs if old in self.products):
            self._settle()
        diags, entries = self._moved(pairs), {old for old, _ in pairs}

        def move() -> None:
            self.diags = diags
            self.products = {entry: h for entry, h in self.products.items() if entry in entries}

        return move

    def handed_over(self, pairs: Sequence[tuple[Entry, Entry]]) -> Curvature:
        """Return the same for the second entry of each pair, where it can be; other arguments are :meth:`follow`'s."""
        self._settle()
        total = Curvature(self._backends, self.seed)
        total.products = {new: self.products[old] for old, new in pairs if old in self.products}
        total.diags, total.is_hvp, total.unscaled = self._moved(pairs), self.is_hvp, self.unscaled
        return total

    def _settle(self) -> None:
        """Multiply pending products by their probe, while it can be drawn: its words are about to change."""
        if self.products and self.is_hvp:
            z = draw_probe(list(self.products), self._backends, probe="rademacher", seed=self.seed, sample=self.sample)
            self.products, self.is_hvp = {entry: h * z[entry] for entry, h in self.products.items()}, False

    def _moved(self, pairs: Sequence[tuple[Entry, Entry]]) -> dict[Bucket, Tensor]:
        """Return the folded diagonals in the buckets of parameters that are laid out anew."""
        diags: dict[Bucket, Tensor] = {}
        for old, new in pairs:
            if old.bucket not in self.diags:
                continue
            folded, bucket, fine = self.diags[old.bucket], new.bucket, new.bucket.averages_magnitudes
            if old.bucket.averages_magnitudes:
                d = old.bucket.logical_view(folded, old).reshape(-1)
                values = d if fine else block_mean(d, new.block)
            elif (old.block, old.absolute) != (new.block, new.absolute) and not old.block == new.block == 1:
                raise RuntimeError(
                    f"block_size or averaging of {new.name} has changed since its curvature of this step was averaged; "
                    "expected it to change after step() or zero_grad()"
                )
            else:
                values = old.bucket.spread(folded, old).reshape(-1) if fine else old.bucket.diag_view(folded, old)
            target = diags.setdefault(bucket, bucket.new_flat() if fine else bucket.new_diag())
            begin = bucket.rows[new.row][Segment.OFFSET if fine else Segment.DIAG_OFFSET]
            target[begin : begin + values.numel()] = values
        return diags


def differentiate(
    parts: Sequence[tuple[Curvature, Sequence[Entry], Sequence[Tensor], str]],
    *,
    n_samples: int,
    retain_graph: bool = False,
    precision: hvp.Precision | None = None,
    weight: float = 1.0,
    inverse_scale: Tensor | None = None,
) -> None:
    """Take in the Hz of parameters and their gradients (which carry a graph) along a step's probes.

    Args:
        parts: what takes in Hz, parameters, their gradients, and the probe, "rademacher" or "gaussian", of each
            optimizer; H is the Hessian by the parameters of all.
        n_samples: probes to average.
        retain_graph: do not free the graph.
        precision: of the products in the second differentiation, as AdaHessian's ``hvp_dtype``.
        weight: factor on Hz.
        inverse_scale: factor that takes GradScaler's scale out of Hz.
    """
    entries: list[Entry] = []
    grads: list[Tensor] = []
    for _, own, of, _ in parts:
        entries += own
        grads += of
    owners = list(map(_OWNER, entries))
    sharded = not all(map(is_, owners, map(_PARAM, entries)))
    for sample in range(n_samples if entries else 0):
        z: dict[Entry, Tensor] = {}
        for curvature, own, _, probe in parts:
            z |= curvature.draw(own, probe=probe, sample=sample)
        products: Iterable[Tensor | None] = hvp.hessian_vector_product(
            grads,
            owners,
            [joined(z[e], e.owner) for e in entries] if sharded else list(map(z.__getitem__, entries)),
            retain_graph=retain_graph or sample + 1 < n_samples,
            precision=precision,
        )
        if sharded:
            products = [h if h is None else part_of(h, owner) for h, owner in zip(products, owners, strict=True)]
        found = {entry: h for entry, h in zip(entries, products, strict=True) if h is not None}
        scales: dict[str, Any] = {"weight": weight, "inverse_scale": inverse_scale}
        for curvature, own, _, probe in parts:
            mine = found if len(parts) == 1 else {entry: found[entry] for entry in own if entry in found}
            curvature.take(mine, probe=probe, n_samples=n_samples, sample=sample, z=z, **scales)
        del z, products, found, mine  # before the next ones come


def _scaled(products: Mapping[Entry, Tensor], factor: Tensor) -> dict[Entry, Tensor]:
    """Multiply products by a scalar; float16 becomes float32, for it cannot hold what GradScaler's factor was for."""
    scaled: dict[Entry, Tensor] = {}
    for bucket, members in by_bucket(list(products)).items():
        wide = [products[e].float() if products[e].dtype == torch.float16 else products[e] for e in members]
        # Not in place: autograd may have handed out one tensor twice.
        scaled |= zip(members, torch._foreach_mul(wide, factor.to(bucket.device)), strict=True)
    return scaled
