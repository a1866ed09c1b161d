"""What every tuned layer has in common: adapters by name, forward, mixed batches, merge and unmerge."""

from __future__ import annotations

import copy
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
from svdtune.functional import change_of_singular_values
from svdtune.known_weight import KnownWeight
from svdtune.learned import LearnedVector, ToBeRead, stacked
from svdtune.offloading import brought_back
from svdtune.reading import weight_to_read
from svdtune.spectrum import Sides, Spectrum

BASE = "__base__"  # PEFT's name, in a mixed batch, for samples that no adapter changes


class SVDScaleShiftLayer(nn.Module, BaseTunerLayer):
    """A frozen layer of which named adapters scale and shift the singular values.

    A subclass says how the base layer's product is changed (`changed_product`), and how the weight is a batch of
    matrices where it is not one (`to_matrices`, `from_matrices`). Several active adapters add their changes of the
    singular values.

    Args:
        base_layer: The layer to tune.
        adapter_name: The first adapter's name.
        config: Its choices.
        rank_pattern_key: Which entry of ``config.rank_pattern`` says the rank; ``config.rank`` does if None.
        quantization_backend: What gives and takes the weight where it is quantised.

    Attributes:
        base_layer: The layer as it was.
        spectrum: U, S, Vᵀ of its weight, decomposed once and shared by all adapters.
        svd_scale_shift_a: a = A - 1 of each adapter that learns it, (g * rank,), from zero.
        svd_scale_shift_b: B of each adapter that learns it, (g * rank,), from zero, in units of the singular values.
        rank: How many leading singular values each adapter tunes.
        nonlinearity: What follows A * S + B in each adapter.
        scaling: What an adapter's change of the singular values is multiplied by, if by another number than one; not
            saved.

    Raises:
        ValueError: if the weight has no values yet (meta device), or values that are not finite.
    """

    adapter_layer_names = ("svd_scale_shift_a", "svd_scale_shift_b")
    cast_input_dtype_enabled = True  # diffusers' layerwise casting sets it
    stock_forwards: tuple[Callable[..., Any], ...] = ()  # of torch's own modules, whose place a product can take
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
        self._before_merge: Any = None
        matrices = self._checked_matrices()
        self.in_features, self.out_features = self.features(matrices)
        rank = config.rank_of(rank_pattern_key, min(matrices.shape[1:]))
        sides, cache = self.sides(matrices, rank, config.one_sided), cache_folder(config.svd_cache)
        self.spectrum = Spectrum(matrices, rank, sides, cache)
        self._known_weight: KnownWeight | None = None
        self._numel_of_weight = matrices.numel()  # under FSDP a process may hold a part of it
        self._know_weight()
        self.update_layer(adapter_name, config, rank_pattern_key)

    def update_layer(
        self, adapter_name: str, config: SVDScaleShiftConfig, rank_pattern_key: str | None = None
    ) -> None:
        """Adds an adapter, or resets the one of that name."""
        rank = config.rank_of(rank_pattern_key, self.spectrum.available_rank)
        if rank > self.spectrum.rank:
            matrices = self._checked_matrices()
            sides, cache = self.sides(matrices, rank, config.one_sided), cache_folder(config.svd_cache)
            self.spectrum = Spectrum(matrices, rank, sides, cache)
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
        """How many features, or channels, go in and come out."""
        return matrices.shape[2], matrices.shape[1]

    def to_matrices(self, weight: Tensor) -> Tensor:
        """The weight as matrices to decompose, (g, out, in); as one, unless a subclass says otherwise."""
        return weight.unsqueeze(0)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        """The reverse of `to_matrices`: matrices (g, out, in) in the shape of the weight."""
        return matrices[0]

    def sides(self, matrices: Tensor, rank: int, one_sided: bool) -> Sides:
        """Whose vectors to hold: those of the smaller side where that is asked for, or costs less than both.

        It does where few values are tuned, and where a quantised layer must compute its own product anyway. Where all
        are tuned, holding both sides saves that product.
        """
        if one_sided or rank < min(matrices.shape[1:]) or self._is_packed:
            return self.smaller_side(matrices)
        return "both"

    def smaller_side(self, matrices: Tensor) -> Sides:
        """The side with the shorter vectors, if a product with them alone can be changed."""
        return "left" if matrices.shape[1] < matrices.shape[2] else "right"

    def changed_product(self, x: Tensor, change: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the base layer, as if its weight were W + U diag(change) Vᵀ.

        ``change`` is (g * rank,), or (B, g * rank) with a row for each sample.
        """
        raise NotImplementedError

    def whole_product(self, x: Tensor, change: Tensor) -> Tensor:
        """The same without the base layer, where both sides of all its singular values are held."""
        return self.changed_product(x, change)

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

    def change_of_singular_values(self, adapter_name: str) -> Tensor:
        """relu(A * S + B) - S of one adapter, (g * rank,), in float32 or better; zero beyond the rank it tunes."""
        return self._changes([adapter_name])[0]

    def _changes(self, adapter_names: list[str]) -> Tensor:
        """The changes of several adapters that have rank and non-linearity in common, (adapters, g * rank)."""
        first = adapter_names[0]
        rank, nonlinearity = self.rank[first], self.nonlinearity[first]
        vectors = self.svd_scale_shift_a if first in self.svd_scale_shift_a else self.svd_scale_shift_b
        device = vectors[first]().device
        if self.spectrum.device != device:
            self.spectrum.to(device)  # FSDP and accelerate move parameters and buffers only
        singular_values = self.spectrum.leading(self.spectrum.singular_values, rank)
        a = stacked(self.svd_scale_shift_a, adapter_names, singular_values)
        b = stacked(self.svd_scale_shift_b, adapter_names, singular_values)
        change = change_of_singular_values(singular_values, a, b, nonlinearity)
        return self.spectrum.padded(self._scaled(change, adapter_names), rank)

    def _scaled(self, changes: Tensor, adapter_names: list[str]) -> Tensor:
        if not self.scaling:
            return changes
        factors = [self.scaling.get(name, 1.0) for name in adapter_names]
        return changes * torch.tensor(factors, dtype=changes.dtype, device=changes.device)[:, None]

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiplies an adapter's change of the weight by a number, as diffusers' ``set_adapters`` asks for."""
        if self.has_adapter(adapter_name):
            self.scaling[adapter_name] = scale
            if scale == 1:
                del self.scaling[adapter_name]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the changes of the active adapters by a number more."""
        for adapter_name in self.active_adapters:
            self.set_scale(adapter_name, self.scaling.get(adapter_name, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """The reverse of `scale_layer`; without a number, of all that was multiplied."""
        for adapter_name in self.active_adapters:
            self.set_scale(adapter_name, 1.0 if scale is None else self.scaling.get(adapter_name, 1.0) / scale)

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with now: W' with its gradient while adapters act on it, and else the base weight.

        For modules that read it instead of calling the layer, so that they are tuned, and merged alike. It is computed
        when it is used (see `reading`), anew at every read.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self._parameter()
        if self.threads_of_mixed_batches and threading.get_ident() in self.threads_of_mixed_batches:
            return weight_to_read(self.spectrum.singular_values, _refuse_to_read, self._like_weight())
        self._follow_weight()
        change = self._change_of_active_adapters()
        if change is None:
            return self._parameter()
        return weight_to_read(change, self.changed_weight, self._like_weight())

    def changed_weight(self, change: Tensor) -> Tensor:
        """W + U diag(change) Vᵀ in the shape and dtype of the base weight W; ``change`` is (g * rank,)."""
        with brought_back(self.base_layer):
            weight = self._unmerged_weight()
            difference = self.from_matrices(self.spectrum.change_of(self.to_matrices(weight), change))
            return weight.to(difference.dtype).add(difference).to(weight.dtype)

    def _like_weight(self) -> Tensor:
        """A tensor with the shape, dtype and device that W' has; the weight may be packed where it is quantised."""
        if self.quantization_backend is not None:
            return self.spectrum.left.new_empty(()).expand(self.out_features, self.in_features)
        weight = self._parameter()
        return self.spectrum.left.new_empty(()).expand(weight.shape) if is_float8(weight) else weight

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """W' - W of one adapter, in the shape of the base weight and in float32 or better."""
        self._follow_weight()
        delta = self.change_of_singular_values(adapter_name)
        return self.from_matrices(self.spectrum.change_of(self.to_matrices(self._unmerged_weight()), delta))

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        self._follow_weight()
        if adapter_names is not None:
            change = self._change_of_each_sample(x, adapter_names)
        elif self.merged:
            return self.base_layer(x, *args, **kwargs)
        else:
            change = self._change_of_active_adapters()
        if change is None:
            return self.base_layer(x, *args, **kwargs)

        spectrum = self.spectrum
        if spectrum.full_rank and spectrum.sides == "both" and not self._base_layer_must_run():
            return self.whole_product(x, change)
        return self.changed_product(x, change, *args, **kwargs)

    def _like_factors(self, x: Tensor) -> Tensor:
        """``x`` in the dtype of U and V: a quantised layer takes other dtypes, and answers in them."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.spectrum.dtype)

    def _base_layer_must_run(self) -> bool:
        """Whether it computes with a weight that is not at hand, or somebody waits for it to be called."""
        base_layer = self.base_layer
        backward_hooks = base_layer._backward_hooks or base_layer._backward_pre_hooks
        hooked = base_layer._forward_hooks or base_layer._forward_pre_hooks or hasattr(base_layer, "_hf_hook")
        patched = "forward" in base_layer.__dict__ or type(base_layer).forward not in self.stock_forwards
        return bool(hooked or backward_hooks) or patched or self._is_packed or self._weight_learns()

    def _weight_learns(self) -> bool:
        """Whether the base weight takes a gradient; FSDP's views of frozen weights only look as if they did."""
        weight = self._parameter()
        return isinstance(weight, nn.Parameter) and weight.requires_grad

    @property
    def _is_packed(self) -> bool:
        """Whether the weight is held in fewer digits than it is multiplied with."""
        return self.quantization_backend is not None or is_float8(self._parameter())

    def _change_of_active_adapters(self) -> Tensor | None:
        change = None
        for adapter_name in self.active_adapters:
            if self.has_adapter(adapter_name):
                one = self.change_of_singular_values(adapter_name)
                change = one if change is None else change + one
        return change

    def _change_of_each_sample(self, x: Tensor, adapter_names: list[str]) -> Tensor | None:
        """A row of changes for each sample of a mixed batch, (B, g * rank); None if no sample has an adapter here."""
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        alike: dict[tuple[int, str], list[str]] = {}
        for name in dict.fromkeys(adapter_names):
            if self.has_adapter(name):
                alike.setdefault((self.rank[name], self.nonlinearity[name]), []).append(name)
        if not alike:
            return None
        changes = [self._changes(names) for names in alike.values()]
        table = torch.cat([torch.zeros_like(changes[0][:1]), *changes])
        row = {name: index for index, name in enumerate(itertools.chain(*alike.values()), start=1)}
        return table[torch.tensor([row.get(name, 0) for name in adapter_names], device=table.device)]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters' changes to the base weight, which is kept aside for `unmerge`.

        Args:
            safe_merge: Whether to refuse, and leave the layer as it was, when the result is not finite.
            adapter_names: The adapters to merge; the active ones if None.

        Raises:
            ValueError: with ``safe_merge``, if the merged weight is not finite.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if self.has_adapter(name)]
        if not adapter_names:
            return
        change = torch.stack([self.get_delta_weight(name) for name in self.merged_adapters + adapter_names]).sum(0)
        present = self.get_base_weight()
        merged = (self._unmerged_weight().to(change) + change).to(present)
        if safe_merge and not readable(merged).isfinite().all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken"
            )
        if self.quantization_backend is None:
            # Another parameter takes its place, for other layers may share it.
            self._before_merge = self._before_merge or (self._parameter(),)
            self._set_parameter(nn.Parameter(merged, self._before_merge[0].requires_grad))
        else:
            # Quantising the original again may not give the same codes: keep the layer, out of the module tree.
            self._before_merge = self._before_merge or (self.base_layer,)
            self.base_layer = copy.deepcopy(self._before_merge[0])
            self.set_base_weight(merged)
            # PEFT makes a new HQQ layer, and forgets its bias.
            self.base_layer.bias = self._before_merge[0].bias
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Puts the base weight back, every bit of it."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        kept = self._before_merge[0]
        if self.quantization_backend is None:
            kept.data = kept.data.to(self._parameter())
            self._set_parameter(kept)
        else:
            self.base_layer = kept.train(self.training)
        self._before_merge = None
        self.merged_adapters.clear()

    def _unmerged_weight(self) -> Tensor:
        """The weight that was decomposed, whether or not adapters are merged into the layer now."""
        if not self.merged:
            return readable(self.get_base_weight().detach())
        if self.quantization_backend is None:
            return readable(self._before_merge[0].detach())
        return self.quantization_backend.get_base_weight(self._before_merge[0]).detach()

    def _parameter(self) -> nn.Parameter:
        """The base weight as the module holds it, merged or not."""
        return cast(nn.Parameter, self.get_base_layer().weight)

    def _set_parameter(self, parameter: nn.Parameter) -> None:
        self.get_base_layer().weight = parameter

    @property
    def _name_of_weight(self) -> str:
        return "weight"

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves A and B, and keeps them in float32 or better whatever the dtype of the base weight.

        PEFT casts them to that dtype and back again, which rounds what was learned to bfloat16's three digits when an
        adapter is loaded with ``low_cpu_mem_usage``, and marks inactive adapters as trainable.
        """
        dtype = torch.promote_types(self.spectrum.dtype, torch.float32)
        self.cast_adapter(adapter_name, dtype, device or self.spectrum.device)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype, device: torch.device | None = None) -> None:
        """Casts and moves A and B of an adapter in place; on the meta device they wait for a checkpoint."""
        for vectors in (self.svd_scale_shift_a, self.svd_scale_shift_b):
            if adapter_name in vectors and not vectors[adapter_name].weight.is_meta:
                parameter = vectors[adapter_name].weight
                parameter.data = parameter.data.to(device, dtype)

    def _apply(self, fn, recurse: bool = True):
        """Moves and casts everything, but what is learned to nothing below float32, which would round it. Factors that
        have lost digits are computed anew when the weight is widened again."""
        before = self.spectrum.dtype
        learned = [*self.svd_scale_shift_a.parameters(), *self.svd_scale_shift_b.parameters()]
        values = [parameter.data for parameter in learned]
        super()._apply(fn, recurse)
        for parameter, value in zip(learned, values, strict=True):
            if parameter.dtype in (torch.bfloat16, torch.float16) and not parameter.is_meta:
                parameter.data = value.to(parameter.device)
        if self.merged and self.quantization_backend is not None:
            self._before_merge[0]._apply(fn, recurse)
        after = self.spectrum.dtype
        if before != after and torch.promote_types(before, after) == after and not self.spectrum.left.is_meta:
            self._decompose(self._unmerged_weight().to(self.spectrum.left))
        self._know_weight()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Decomposes again where a state dict brings another base weight."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        key = self._weight_key(prefix)
        loaded = state_dict.get(key)
        if loaded is None or self.quantization_backend is not None or loaded.shape != self._parameter().shape:
            return
        known, loaded = (readable(_whole(tensor.detach())) for tensor in (self._parameter(), loaded))
        if not known.is_meta:
            loaded = loaded.to(known)
            if torch.equal(loaded, known):
                return
        if self.merged:
            raise ValueError(f"{key} cannot be loaded while an adapter is merged; unmerge_adapter() first.")
        self._decompose(loaded)

    def _decompose(self, weight: Tensor) -> None:
        """Takes another weight apart as the one before."""
        self.spectrum = Spectrum(self.to_matrices(weight), self.spectrum.rank, self.spectrum.sides, cache_folder(None))
        self._know_weight()

    def _know_weight(self) -> None:
        if self.quantization_backend is None and not self.merged:
            self._known_weight = KnownWeight(self._parameter())  # not its `data`, which counts its own writes

    def _follow_weight(self) -> None:
        """Decomposes again where the weight was written to: processes may differ until DDP sends that of the first."""
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
        """Where a state dict holds the weight, for a layer whose own entries begin with ``prefix``."""
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
        return f"rank={self.rank}"

    def __repr__(self) -> str:
        return "svdtune." + super().__repr__()


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has sharded, gathered from all processes; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") and not tensor.is_meta else tensor


def _refuse_to_read(_: Tensor) -> Tensor:
    raise ValueError(
        "A module reads the weight of a tuned layer instead of calling it, which cannot be in a mixed batch: each "
        "sample would need a weight of its own. Run the samples of each adapter by themselves, after `set_adapter`."
    )
