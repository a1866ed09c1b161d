"""What all tuned layers have in common: adapters by name, forward, mixed batches, merge and unmerge.

`SVDScaleShiftLayer` is the base class; its docstring says what a kind of layer has to define. `svdtune.kinds` has the
kinds, `svdtune.forms` the rule that chooses a form of the product, `svdtune.merging` the two ways to merge.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from svdtune.cache import cache_folder
from svdtune.computed_weights import REMEDY, is_computed
from svdtune.config import SVDScaleShiftConfig
from svdtune.float8 import is_float8, readable
from svdtune.forms import Form, choose
from svdtune.functional import delta_of_singular_values
from svdtune.known_weight import KnownWeight
from svdtune.learned import LearnedVector, ToBeRead, stacked
from svdtune.merging import PlainMerge, QuantizedMerge, merged_weight
from svdtune.offloading import brought_back
from svdtune.reading import weight_to_read
from svdtune.spectrum import Spectrum

BASE = "__base__"  # in a mixed batch, PEFT's name for samples without an adapter


class SVDScaleShiftLayer(nn.Module, BaseTunerLayer):
    """A frozen layer of which named adapters scale and shift the singular values.

    Several active adapters add their deltas, the changes of the singular values.

    A kind of layer is a subclass. It defines, with g matrices per weight (g > 1 in grouped convolutions):

    - ``forms``: the forms of the product that it offers (see `svdtune.forms`), as data.
    - For each of them the method that `Form.hook` names. All take x and ``delta``, (g * rank,) for the whole batch or
      (B, g * rank) with a row per sample, and return what the base layer would with the weight W + U diag(delta) Vᵀ:

      - ``factored_product(x, delta)`` and ``rebuilt_product(x, delta)`` replace the base layer's own product.
      - ``right_sided_product(x, delta, *args, **kwargs)`` and ``left_sided_product(...)``, the one-sided forms with V
        and with U, call the base layer with the further arguments, and change its input or its output.
      - ``delta_product(...)`` is defined here; a kind defines ``with_delta(y, x, delta)``, what it adds to the output
        y. The one-sided forms add the same for the tail, the values that are too small to divide by.

    - ``rows_to_rebuild_for(x, delta)``: how many rows W' can be rebuilt for, if it offers the rebuilt form.
    - ``to_matrices(weight)`` and ``from_matrices(matrices)``: the weight as matrices (g, out, in), and back.
    - ``features(matrices)``: the sizes (in, out) of its inputs and outputs.
    - ``stock_forwards``: torch's own forward methods, which the factored and rebuilt products may replace. Where the
      base layer has another forward method, or hooks, it is called.

    A kind without a matrix product of its own overrides ``forward`` (see `svdtune.param_wrapper`).

    Args:
        base_layer: The layer to tune.
        adapter_name: The first adapter's name.
        config: Its choices.
        rank_pattern_key: The entry of ``config.rank_pattern`` that gives the rank; ``config.rank`` gives it if None.
        quantization_backend: PEFT's access to the weight where it is quantised.

    Attributes:
        base_layer: The layer as it was.
        spectrum: U, S, Vᵀ of its weight, decomposed once and shared by all adapters.
        svd_scale_shift_a: a = A - 1 of each adapter that learns it, (g * rank,), from zero.
        svd_scale_shift_b: B of each adapter that learns it, (g * rank,), from zero, in units of the singular values.
        rank: How many leading singular values each adapter tunes.
        nonlinearity: What follows A * S + B in each adapter.
        scaling: The factor of an adapter's delta, where it is not one; not saved.

    Raises:
        ValueError: if the weight has no values yet (meta device), or values that are not finite.
    """

    adapter_layer_names = ("svd_scale_shift_a", "svd_scale_shift_b")
    cast_input_dtype_enabled = True  # diffusers' layerwise casting sets it
    forms: tuple[Form, ...] = ()
    stock_forwards: tuple[Callable[..., Any], ...] = ()
    other_param_names = ("rank", "nonlinearity", "scaling")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SVDScaleShiftConfig,
        rank_pattern_key: str | None = None,
        quantization_backend: QuantizationBackend | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        self.svd_scale_shift_a = nn.ModuleDict()
        self.svd_scale_shift_b = nn.ModuleDict()
        self.rank: dict[str, int] = {}
        self.nonlinearity: dict[str, str] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.threads_of_mixed_batches: set[int] = set()
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._merge = PlainMerge() if quantization_backend is None else QuantizedMerge(quantization_backend)
        matrices = self._checked_matrices()
        self.in_features, self.out_features = self.features(matrices)
        self._decompose_for(config, matrices, config.rank_of(rank_pattern_key, min(matrices.shape[1:])))
        self._known_weight: KnownWeight | None = None
        self._numel_of_weight = matrices.numel()  # under FSDP a process may hold a part of it
        self._know_weight()
        self.update_layer(adapter_name, config, rank_pattern_key)

    def update_layer(
        self, adapter_name: str, config: SVDScaleShiftConfig, rank_pattern_key: str | None = None
    ) -> None:
        """Adds an adapter, or resets the one of that name."""
        rank = config.rank_of(rank_pattern_key, min(self.spectrum.shape))
        if rank > self.spectrum.rank:
            self._decompose_for(config, self._checked_matrices(), rank)
        self.rank[adapter_name] = rank
        self.nonlinearity[adapter_name] = config.nonlinearity
        self.scaling.pop(adapter_name, None)
        count = len(self.spectrum.leading(self.spectrum.singular_values, rank))
        noise = 0.0 if config.init_weights else 1.0
        if config.scale:
            self.svd_scale_shift_a[adapter_name] = LearnedVector(0.3 * noise * torch.randn(count))
        if config.shift:
            self.svd_scale_shift_b[adapter_name] = LearnedVector(0.03 * noise * torch.randn(count))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def features(self, matrices: Tensor) -> tuple[int, int]:
        """The sizes (in, out) of inputs and outputs: features or channels."""
        return matrices.shape[2], matrices.shape[1]

    def to_matrices(self, weight: Tensor) -> Tensor:
        """The weight as matrices to decompose, (g, out, in)."""
        return weight.unsqueeze(0)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        """The reverse of `to_matrices`: matrices (g, out, in) in the shape of the weight."""
        return matrices[0]

    def rows_to_rebuild_for(self, x: Tensor, delta: Tensor) -> int | None:
        """How many rows the rebuilt form would multiply with W'; None if W' cannot be rebuilt for this input."""
        return None

    def with_delta(self, y: Tensor, x: Tensor, delta: Tensor) -> Tensor:
        """y + U diag(delta) Vᵀ x, with ``delta`` (g * tail,) or (B, g * tail) for the tail of the spectrum."""
        raise NotImplementedError

    def delta_product(self, x: Tensor, delta: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The delta form: the base layer's output plus U diag(delta) Vᵀ x. The tail is all of the values here."""
        return self.with_delta(self.base_layer(x, *args, **kwargs), x, delta)

    def form_for(self, x: Tensor, delta: Tensor) -> Form:
        """The form of the product that `forward` takes."""
        spectrum = self.spectrum
        # One side's vectors leave one form, which runs the base layer.
        if spectrum.sides != "both" or self._base_layer_must_run():
            return choose(self.forms, spectrum.shape, spectrum.rank, held=spectrum.sides, base_layer_runs=True)
        return choose(
            self.forms,
            spectrum.shape,
            spectrum.rank,
            held="both",
            rows=self.rows_to_rebuild_for(x, delta),
            backward=torch.is_grad_enabled(),
        )

    @property
    def svd_scale_shift_scale(self) -> Mapping[str, Tensor]:
        """A of each adapter that learns it, as in the paper, to be read: 1 + a."""
        return ToBeRead(self.svd_scale_shift_a, lambda a: 1 + a)

    @property
    def svd_scale_shift_shift(self) -> Mapping[str, Tensor]:
        """B of each adapter that learns it, as in the paper, to be read."""
        return ToBeRead(self.svd_scale_shift_b, lambda b: b)

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether this layer is tuned by the adapter of that name."""
        return adapter_name in self.rank

    def delta_of(self, adapter_name: str) -> Tensor:
        """relu(A * S + B) - S of one adapter, (g * rank,), in float32 or better; zero beyond the rank it tunes."""
        return self._deltas_of([adapter_name])[0]

    def _deltas_of(self, adapter_names: list[str]) -> Tensor:
        """The deltas of several adapters of the same rank and nonlinearity, (adapters, g * rank)."""
        first = adapter_names[0]
        rank, nonlinearity = self.rank[first], self.nonlinearity[first]
        vectors = self.svd_scale_shift_a if first in self.svd_scale_shift_a else self.svd_scale_shift_b
        device = vectors[first]().device
        if self.spectrum.device != device:
            self.spectrum.to(device)  # FSDP and accelerate move parameters and buffers only
        singular_values = self.spectrum.leading(self.spectrum.singular_values, rank)
        a = stacked(self.svd_scale_shift_a, adapter_names, singular_values)
        b = stacked(self.svd_scale_shift_b, adapter_names, singular_values)
        deltas = delta_of_singular_values(singular_values, a, b, nonlinearity)
        return self.spectrum.padded(self._scaled(deltas, adapter_names), rank)

    def _scaled(self, deltas: Tensor, adapter_names: list[str]) -> Tensor:
        """Each adapter's delta (adapters, g * rank) times its `scaling`."""
        if not self.scaling:
            return deltas
        factors = [self.scaling.get(name, 1.0) for name in adapter_names]
        return deltas * torch.tensor(factors, dtype=deltas.dtype, device=deltas.device)[:, None]

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Sets the factor of an adapter's delta, as diffusers' ``set_adapters`` does."""
        if self.has_adapter(adapter_name):
            self.scaling[adapter_name] = scale
            if scale == 1:
                del self.scaling[adapter_name]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the factors of the active adapters' deltas by a number."""
        for adapter_name in self.active_adapters:
            self.set_scale(adapter_name, self.scaling.get(adapter_name, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """The reverse of `scale_layer`; without a number, sets the factors to one."""
        for adapter_name in self.active_adapters:
            self.set_scale(adapter_name, 1.0 if scale is None else self.scaling.get(adapter_name, 1.0) / scale)

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with now: W', with its gradient, while adapters act on it; else the base weight.

        Some modules read the weight instead of calling the layer. W' is computed when it is used (see `reading`), and
        again for each read.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self._parameter()
        if self.threads_of_mixed_batches and threading.get_ident() in self.threads_of_mixed_batches:
            return weight_to_read(self.spectrum.singular_values, _refuse_to_read, self._like_weight())
        self._follow_weight()
        delta = self._delta_of_active_adapters()
        if delta is None:
            return self._parameter()
        return weight_to_read(delta, self.changed_weight, self._like_weight())

    def changed_weight(self, delta: Tensor) -> Tensor:
        """W' = W + U diag(delta) Vᵀ in the shape and dtype of the base weight W; ``delta`` is (g * rank,)."""
        with brought_back(self.base_layer):
            weight = self._unmerged_weight()
            change = self.from_matrices(self.spectrum.weight_change(self.to_matrices(weight), delta))
            return weight.to(change.dtype).add(change).to(weight.dtype)

    def _like_weight(self) -> Tensor:
        """A tensor with the shape, dtype and device of W', which may differ from those of a packed weight."""
        if self._is_quantized:
            return self.spectrum.left.new_empty(()).expand(self.out_features, self.in_features)
        weight = self._parameter()
        return self.spectrum.left.new_empty(()).expand(weight.shape) if is_float8(weight) else weight

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """W' - W of one adapter, in the shape of the base weight and in float32 or better."""
        self._follow_weight()
        delta = self.delta_of(adapter_name)
        return self.from_matrices(self.spectrum.weight_change(self.to_matrices(self._unmerged_weight()), delta))

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        self._follow_weight()
        if adapter_names is not None:
            delta = self._delta_of_each_sample(x, adapter_names)
        elif self.merged:
            return self.base_layer(x, *args, **kwargs)
        else:
            delta = self._delta_of_active_adapters()
        if delta is None:
            return self.base_layer(x, *args, **kwargs)
        return self.form_for(x, delta).product(self, x, delta, *args, **kwargs)

    def _like_factors(self, x: Tensor) -> Tensor:
        """``x`` in the dtype of U and V, since a quantised layer takes and returns other dtypes."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.spectrum.dtype)

    def _base_layer_must_run(self) -> bool:
        """Whether the base layer must be called: its weight is packed or learns, or its forward is not torch's own."""
        base_layer = self.base_layer
        # Hooks wait for a call of the base layer, also accelerate's, which brings offloaded weights back.
        backward_hooks = base_layer._backward_hooks or base_layer._backward_pre_hooks
        hooked = base_layer._forward_hooks or base_layer._forward_pre_hooks or hasattr(base_layer, "_hf_hook")
        patched = "forward" in base_layer.__dict__ or type(base_layer).forward not in self.stock_forwards
        return bool(hooked or backward_hooks) or patched or self._is_packed or self._weight_learns()

    def _weight_learns(self) -> bool:
        """Whether the base weight takes a gradient."""
        # FSDP's views of frozen weights say so too, but they are no parameters.
        weight = self._parameter()
        return isinstance(weight, nn.Parameter) and weight.requires_grad

    @property
    def _is_quantized(self) -> bool:
        return self.quantization_backend is not None

    @property
    def _is_packed(self) -> bool:
        """Whether the weight is stored in fewer bits than it is multiplied in."""
        return self._is_quantized or is_float8(self._parameter())

    def _delta_of_active_adapters(self) -> Tensor | None:
        """The sum of the active adapters' deltas, (g * rank,); None if no active adapter tunes this layer."""
        delta = None
        for adapter_name in self.active_adapters:
            if self.has_adapter(adapter_name):
                one = self.delta_of(adapter_name)
                delta = one if delta is None else delta + one
        return delta

    def _delta_of_each_sample(self, x: Tensor, adapter_names: list[str]) -> Tensor | None:
        """One row per sample of a mixed batch, (B, g * rank); None if no sample has an adapter here."""
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        # Adapters of the same rank and nonlinearity are computed in one go: there may be hundreds.
        groups: dict[tuple[int, str], list[str]] = {}
        for name in dict.fromkeys(adapter_names):
            if self.has_adapter(name):
                groups.setdefault((self.rank[name], self.nonlinearity[name]), []).append(name)
        if not groups:
            return None
        deltas = [self._deltas_of(names) for names in groups.values()]
        # Row 0 is zero, for samples without an adapter here.
        table = torch.cat([torch.zeros_like(deltas[0][:1]), *deltas])
        row_of = {name: row for row, name in enumerate(itertools.chain(*groups.values()), start=1)}
        return table[torch.tensor([row_of.get(name, 0) for name in adapter_names], device=table.device)]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters' changes to the base weight, and keeps the base weight for `unmerge`.

        Args:
            safe_merge: Whether to refuse, and leave the layer as it was, when the result is not finite.
            adapter_names: The adapters to merge; the active ones if None.

        Raises:
            ValueError: with ``safe_merge``, if the merged weight is not finite.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if self.has_adapter(name)]
        if not adapter_names:
            return
        # From the original weight and all adapters, so that no rounding adds up from one merge to the next.
        changes = [self.get_delta_weight(name) for name in self.merged_adapters + adapter_names]
        merged = merged_weight(self._unmerged_weight(), changes, like=self.get_base_weight())
        if safe_merge and not readable(merged).isfinite().all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken"
            )
        self._merge.do(self, merged)
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Puts the base weight back, every bit of it."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._merge.undo(self)
        self.merged_adapters.clear()

    def _unmerged_weight(self) -> Tensor:
        """The weight that was decomposed, whether or not adapters are merged into the layer now."""
        return self._merge.original(self) if self.merged else readable(self.get_base_weight().detach())

    def _parameter(self) -> nn.Parameter:
        """The base weight as the module holds it, merged or not."""
        return cast(nn.Parameter, self.get_base_layer().weight)

    def _set_parameter(self, parameter: nn.Parameter) -> None:
        self.get_base_layer().weight = parameter

    @property
    def _name_of_weight(self) -> str:
        return "weight"

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves a and B, and keeps them in float32 or better whatever the dtype of the base weight.

        PEFT would cast them to that dtype and back when an adapter is loaded with ``low_cpu_mem_usage``. That rounds
        them to bfloat16's three digits, and marks inactive adapters as trainable.
        """
        dtype = torch.promote_types(self.spectrum.dtype, torch.float32)
        self.cast_adapter(adapter_name, dtype, device or self.spectrum.device)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype, device: torch.device | None = None) -> None:
        """Casts and moves a and B of an adapter in place. On the meta device they wait for a checkpoint."""
        for vectors in (self.svd_scale_shift_a, self.svd_scale_shift_b):
            if adapter_name in vectors and not vectors[adapter_name].weight.is_meta:
                parameter = vectors[adapter_name].weight
                parameter.data = parameter.data.to(device, dtype)

    def _apply(self, fn, recurse: bool = True):
        """Moves and casts the layer, its factors and what a merge keeps.

        a and B stay in float32 or better, since a narrower dtype would round them. Factors that were rounded are
        computed again when the layer is cast to a wider dtype.
        """
        before = self.spectrum.dtype
        learned = [*self.svd_scale_shift_a.parameters(), *self.svd_scale_shift_b.parameters()]
        values = [parameter.data for parameter in learned]
        super()._apply(fn, recurse)
        for parameter, value in zip(learned, values, strict=True):
            if parameter.dtype in (torch.bfloat16, torch.float16) and not parameter.is_meta:
                parameter.data = value.to(parameter.device)
        if self.merged:
            self._merge.moved(fn, recurse)
        after = self.spectrum.dtype
        if before != after and torch.promote_types(before, after) == after and self.spectrum.device.type != "meta":
            self._decompose(self._unmerged_weight().to(self.spectrum.left))
        self._know_weight()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Decomposes again if the state dict has a different base weight."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        key = self._weight_key(prefix)
        loaded = state_dict.get(key)
        if loaded is None or self._is_quantized or loaded.shape != self._parameter().shape:
            return
        known, loaded = (readable(_whole(tensor.detach())) for tensor in (self._parameter(), loaded))
        if not known.is_meta:
            loaded = loaded.to(known)
            if torch.equal(loaded, known):
                return
        if self.merged:
            raise ValueError(f"{key} cannot be loaded while an adapter is merged; unmerge_adapter() first.")
        self._decompose(loaded)

    def _decompose_for(self, config: SVDScaleShiftConfig, matrices: Tensor, rank: int) -> None:
        """Decomposes the weight, given as matrices, and holds the vectors that the form to take needs."""
        shape = (matrices.shape[1], matrices.shape[2])
        form = choose(self.forms, shape, rank, one_sided=config.one_sided, base_layer_runs=self._is_packed)
        self.spectrum = Spectrum(matrices, rank, form.holds, cache_folder(config.svd_cache))

    def _decompose(self, weight: Tensor) -> None:
        """Decomposes another weight to the same rank, and holds the same sides' vectors."""
        self.spectrum = Spectrum(self.to_matrices(weight), self.spectrum.rank, self.spectrum.sides, cache_folder(None))
        self._know_weight()

    def _know_weight(self) -> None:
        if not self._is_quantized and not self.merged:
            self._known_weight = KnownWeight(self._parameter())  # not its `data`, which counts its own writes

    def _follow_weight(self) -> None:
        """Decomposes again if the weight was written to, as by DDP, which sends the first process's weights to all."""
        known = self._known_weight
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if known is None or self.merged or traced:
            return
        weight = self._parameter()
        if not isinstance(weight, nn.Parameter) and is_computed(self.get_base_layer(), self._name_of_weight):
            raise TypeError(
                f"{self.get_base_layer()} cannot be tuned any longer: its {self._name_of_weight} is computed from "
                f"other parameters since then. {REMEDY}"
            )
        if weight.numel() == self._numel_of_weight and known.is_another(weight):
            self._decompose(readable(weight.detach()))

    def _weight_key(self, prefix: str) -> str:
        """The weight's key in a state dict, for a layer whose keys begin with ``prefix``."""
        return f"{prefix}base_layer.weight"

    def _checked_matrices(self) -> Tensor:
        parameters = list(self.get_base_layer().parameters())
        with gather_params_ctx(parameters), brought_back(self.base_layer):
            weight = self._unmerged_weight()
            if weight.is_meta:
                raise ValueError("its weight is on the meta device. Load the base model before adding the adapter.")
            if not weight.isfinite().all():
                raise ValueError("its weight holds NaN or infinite values, so it has no singular values.")
            if not weight.numel():
                raise ValueError("its weight has no rows or no columns, so it has no singular values.")
            return self.to_matrices(weight)

    def extra_repr(self) -> str:
        """The adapters' ranks, and the form that is taken for few rows."""
        spectrum = self.spectrum
        runs = spectrum.sides != "both" or self._base_layer_must_run()
        form = choose(self.forms, spectrum.shape, spectrum.rank, held=spectrum.sides, base_layer_runs=runs)
        return f"rank={self.rank}, form={form}"

    def __repr__(self) -> str:
        return "svdtune." + super().__repr__()


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has sharded, gathered from all processes; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") and not tensor.is_meta else tensor


def _refuse_to_read(_: Tensor) -> Tensor:
    raise ValueError(
        "A module reads the weight of a tuned layer instead of calling it, which cannot be in a mixed batch: each "
        "sample would need a weight of its own. Run the samples of each adapter by themselves, after `set_adapter`."
    )
