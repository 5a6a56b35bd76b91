"""Plans the memory of requests: the arguments of `memory.make_plan` from a request, a plan for each of its passes."""

from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from .adapters.formulas import Uses, branch_bytes
from .disks import speeds
from .inputs import style as styles
from .inputs.large import Large
from .inputs.maps import open_depth
from .memory import (
    HELD,
    MemoryPlan,
    StyleNeeds,
    WeightSizes,
    choose_view,
    input_needs,
    machine_memory,
    make_plan,
    map_needs,
    style_needs,
)
from .presets import SOLVERS
from .request import ResolvedRequest
from .sampling.caches import cache_bytes
from .sampling.enlarge import View, second_views
from .weights import ComponentFolder, ModelFolder

_GUIDED = 8  # arrays of latents that the guidance of a second pass holds at one time


@dataclass(frozen=True)
class Planner:
    """Everything besides a request that decides its plan.

    Attributes:
        folder: the model.
        weights: sizes of its weights.
        dtype: the compute type.
        memory: bytes that may be used; None: as many as the machine offers, and as few as its disk allows.
        beside: bytes of them that something else takes meanwhile.
        uses: adapters with their weights.
        filtered: filters check the pictures.
        redux: for style images; None: the installed one.
        depth: the depth network; None: the installed one.
    """

    folder: ModelFolder
    weights: WeightSizes
    dtype: mx.Dtype
    memory: int | None
    beside: int
    uses: Uses
    filtered: bool
    redux: ComponentFolder | None
    depth: ComponentFolder | None

    def plan(self, request: ResolvedRequest) -> MemoryPlan:
        """Returns the plan of a request.

        Raises:
            ResourceError: not even the smallest plan fits.
        """
        first = self._pass(request, request.width, request.height) if request.first_steps else None
        if not (request.large and request.enlarges):
            assert first is not None  # only an image that is enlarged has no first pass
            return first
        return self._second(request, request.large).after(first)

    def _second(self, request: ResolvedRequest, large: Large) -> MemoryPlan:
        """Returns the plan of the second pass."""
        views = second_views(large.size, large.own, large.factor, self.folder.vae.sizes.downsampling)

        def plan(view: View) -> MemoryPlan:
            return self._pass(request, large.width, large.height, view)

        if large.tiles is not None:
            return plan(views[large.tiles])
        return choose_view(self.folder.flux.sizes, *views, request.max_sequence_length, plan)[0]

    def _pass(self, resolved: ResolvedRequest, width: int, height: int, view: View | None = None) -> MemoryPlan:
        """Returns the plan of one pass at its size; `view` is the second's."""
        needs = partial(input_needs, made=resolved.inputs.made, as_floats=resolved.output_type == "np")
        read = (HELD * width * height,) if view and not resolved.inputs.canvas else ()
        return make_plan(
            self.weights,
            self.folder.sizes,
            self.dtype,
            width=width,
            height=height,
            text_length=resolved.max_sequence_length,
            steps=resolved.num_inference_steps,
            conditions=resolved.prompts * (2 if resolved.true_cfg else 1),
            images=needs((*resolved.inputs.bytes, *read), *resolved.inputs.pasted_pixels),
            references=resolved.inputs.sizes,
            style=self._style_needs(resolved),
            map_bytes=self._map_needs(resolved),
            adapters=branch_bytes(self.uses, self.folder.sizes, self.dtype),
            filtered=self.filtered,
            cached=self._cached(resolved, view),
            view=view,
            budget=(self.memory or machine_memory()) - self.beside,
            speeds=None if self.memory else speeds(self.folder.path),
        )

    def _style_needs(self, request: ResolvedRequest) -> StyleNeeds | None:
        """Returns what the style images of a request need; None: it has none."""
        if request.style is None:
            return None
        networks = (self.redux or styles.open_redux(self.folder.flux.sizes)).networks
        return style_needs(
            {name: network.sizes for name, network in networks.items()},
            networks["image_encoder"].dtype,
            self.dtype,
            images=len(request.style.images),
            pixels=sum(image.width * image.height for image in request.style.images),
            tokens=request.style.tokens(networks["image_encoder"].sizes.side),
            prompts=request.prompts,
        )

    def _cached(self, request: ResolvedRequest, view: View | None) -> int:
        """Returns the bytes of the step cache, which the second pass has not, and of what a solver keeps."""
        flux, patch = self.folder.flux.sizes, 2 * self.folder.vae.sizes.downsampling
        tokens = request.width * request.height // patch**2
        if view:
            velocities = request.batch * view.width * view.height // 4 * flux.out_channels
            return 4 * velocities * (_GUIDED + (2 if request.solver != SOLVERS[0] else 0))
        velocities = request.batch * tokens * flux.out_channels
        streams = (tokens + request.inputs.reference_tokens(patch)) * flux.hidden_size * request.batch
        size = 4 if self.dtype == mx.float16 else self.dtype.size  # whose stream is float32
        held = cache_bytes(request.cache, velocities, streams * (2 if request.true_cfg else 1), size)
        return held + (0 if request.solver == SOLVERS[0] else 4 * 2 * velocities)

    def _map_needs(self, request: ResolvedRequest) -> int:
        """Returns the bytes that the map of a request's photo needs; 0: none is made."""
        kind = request.inputs.kind
        depth = (self.depth or open_depth()).networks["depth"].sizes if kind == "depth" else None
        return map_needs(depth, request.width, request.height) if kind else 0
