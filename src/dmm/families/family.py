"""What a family of models is: the one place that knows what differs between them."""

from collections.abc import Callable, Container, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from torch import Tensor

from dmm.families.anatomy import UNET, Anatomy
from dmm.families.conditioning import Frame
from dmm.maths.diffusion import PredictionType
from dmm.maths.flow import Density


@dataclass(frozen=True)
class Component:
    """A part of a pipeline that has weights."""

    name: str
    """Its attribute of the pipeline and its subfolder of a stock folder."""
    model_class: Any
    original_prefix: str
    """What its tensors' names begin with in a single file of the original layout."""
    weights_name: str
    """Stem of its weight files in a stock folder."""
    tokenizer: str | None = None
    """Of a text encoder: the attribute of the pipeline, and the subfolder, that makes the tokens which it reads."""
    _: KW_ONLY
    layout: Literal["unet", "vae", "clip", "open_clip"] | None = None
    """How the original layout keeps its tensors, see :mod:`dmm.formats.original_layout`; None of what is no part of a
    full checkpoint."""
    unread: tuple[str, ...] = ()
    """Patterns of its own tensors' names that files carry along and nothing computes with."""
    kohya: tuple[str, ...] = ()
    """What names of its layers begin with in LoRAs of kohya's layout; the first is written."""
    comfy: tuple[str, ...] = ()
    """The same of a text encoder in LoRAs that ComfyUI saves."""
    optional: bool = False
    """Whether models do without it."""
    num_tokens: int | None = None
    """Of a text encoder, the tokens of a prompt that it is given where that is not its tokenizer's to say; clip_skip
    counts no layers of such a one."""
    template: Callable[[Any, str], str] | None = None
    """Of a text encoder that is a language model: what stands in a prompt's place, given the tokenizer. Which of its
    tokens are padding is told beside them, under the tokenizer's name with ``_mask``."""

    @property
    def title(self) -> str:
        """What people call it."""
        return "UNet" if self.layout == "unet" else self.name


@dataclass(frozen=True)
class AuthorsLayout:
    """How DMM's authors released merged models of a family."""

    pipeline: str
    """Their pipeline's class, as ``model_index.json`` has it."""
    embed_type: str
    """``addition_embed_type`` in the config of their denoiser."""
    stock_embed_type: str | None
    """The same in the config of the stock one."""
    mlp: str
    """What their denoiser calls the MLP of the style prompts."""


Width = tuple[str, int, int]
"""What of a denoiser's config must agree with its other parts: the sentence's verb, what is found, what they give."""


def unet_widths(configs: Mapping[str, Any]) -> list[Width]:
    """Of a UNet: of several text encoders the embeddings are read side by side."""
    unet = next(iter(configs.values()))
    text = sum(one.hidden_size for name, one in configs.items() if name.startswith("text_encoder"))
    return [
        ("reads text of width (cross_attention_dim)", unet.cross_attention_dim, text),
        ("reads latent channels (in_channels)", unet.in_channels, configs["vae"].latent_channels),
    ]


@dataclass(frozen=True)
class Packing:
    """The form in which pipelines take latents and give them back."""

    channels: Callable[[Any], int]
    """Of latents, given the denoiser's config."""
    pack: Callable[[Tensor], Tensor]
    """(B, C, H, W) -> what a call takes as ``latents``."""
    unpack: Callable[[Tensor, int, int], Tensor]
    """What a call gives, and H and W -> (B, C, H, W)."""


@dataclass(frozen=True)
class Family:
    """One family whose models can be opened and merged."""

    name: str
    """Its key in ``dmm.families.FAMILIES``, by which a merged model's side-car names it."""
    title: str
    """What people call it."""
    pipeline_class: Any
    pipelines: Mapping[frozenset[str], Any]
    """What paints by a ``control``, from an ``image``, in a ``mask``: the pipeline classes by what guides them."""
    components: tuple[Component, ...]
    """The denoiser comes first."""
    controlnet: Component | None
    """What guides the denoiser by an image: a copy of its first half, which embeds time at the same port. None where
    such are not known here."""
    read_tokens: Callable[[Any, Mapping[str, Tensor], int | None], dict[str, Tensor]]
    """What the denoiser reads of prompts, as the pipeline's ``encode_prompt`` has it, by the names of
    :mod:`dmm.families.conditioning`: given a pipeline, (B, T) tokens by tokenizer, and how many last layers are left
    out further."""
    layers_left_out: int
    """How many last layers of its text encoders no prompt passes."""
    read_size: Callable[[Frame], dict[str, Tensor]]
    """What the denoiser reads of a picture's size, without the batch's dimension."""
    prompt_arguments: Mapping[str, str]
    """What its pipelines' calls name the tensors of ``read_tokens``; the negative prompt's with ``negative_``."""
    port: str
    """Path, in the denoiser, of the last linear layer of what embeds time: to its output the style term is added."""
    owns: Callable[[Mapping[str, Any]], bool]
    """Whether a denoiser of this config is one of the family's; what has the pipeline class may be another's."""
    markers: tuple[str, ...]
    """Parts of tensors' names that tell a single file of the original layout."""
    architecture: str
    """What ``modelspec.architecture`` calls it."""
    v_architecture: str
    """The same of one that predicts v, which may have a name of its own."""
    kohya_name: str
    """What kohya's scripts call it, in ``ss_base_model_version``."""
    authors: AuthorsLayout | None
    """None of a family that they released nothing of."""
    predicts: str | None
    """What a single file predicts that does not say it: ``epsilon``, or None where only its configs tell."""
    hub_id: str
    """Of the model whose configs and tokenizer a single file follows that says nothing itself: diffusers' choice."""
    _: KW_ONLY
    anatomy: Anatomy = UNET
    """How its denoiser is asked, and what is caught of it."""
    density: Density | None = None
    """Of a family that is trained by rectified flow, how its sigmas are drawn, before the scheduler's shift."""
    widths: Callable[[Mapping[str, Any]], list[Width]] = unet_widths
    """What must agree, given the configs of the parts that there are, by name, the denoiser's first."""
    samplers: tuple[str, ...] | None = None
    """Those of :data:`dmm.pipeline.samplers.SAMPLERS` that its pipelines take, the first where none is asked for; None
    for all."""

    has_wide_states: bool = False
    """Whether what its text encoders say may exceed float16, and is stored in bfloat16."""
    reads_layers: bool = True
    """Whether it reads a layer of CLIP's, so that a layer before that may be read instead."""
    takes_regions: bool = True
    """Whether its denoiser is called with latents as they lie, of which regions can be cut."""
    keeps_rows: bool = True
    """Whether all layers of its denoiser see a batch's samples as rows; else several styles are painted in turn."""
    patch: int | None = None
    """Latents a side that its denoiser takes at a time; None where ``patch_size`` of its config says it."""
    sample_size: int | None = None
    """Latents a side of the pictures that its models are made for, of a family whose configs do not say it."""
    packing: Packing | None = None
    """How its pipelines pass latents to and fro; None where they do it as a VAE has them."""

    def __reduce__(self) -> tuple[Any, ...]:
        # by its name: other processes of a run know the same families
        return _family_named, (self.name,)

    @property
    def is_flow(self) -> bool:
        """Whether its models are trained by rectified flow; else they keep variance."""
        return self.density is not None

    @property
    def prediction_types(self) -> tuple[PredictionType, ...]:
        """What its models may predict."""
        return ("flow_prediction",) if self.is_flow else ("epsilon", "v_prediction")

    def patch_of(self, config: Any) -> int:
        """Latents a side that a denoiser of this config takes at a time."""
        return self.patch or int(config.get("patch_size") or 1)

    def sample_size_of(self, config: Any) -> Any:
        """Latents a side of the pictures that a denoiser of this config was made for: a number, two, or nothing."""
        return self.sample_size if self.sample_size is not None else config.sample_size

    @property
    def denoiser(self) -> Component:
        """What is trained."""
        return self.components[0]

    def present(self, parts: Container[str]) -> tuple[Component, ...]:
        """Its components, of the optional ones those that are among the named parts."""
        return tuple(one for one in self.components if not one.optional or one.name in parts)

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """What reads prompts, in the order in which the denoiser takes what they make of them."""
        return tuple(one for one in self.components if one.tokenizer)

    @property
    def clips(self) -> tuple[Component, ...]:
        """Those of its text encoders that are CLIP's, which people train along with a denoiser."""
        return tuple(one for one in self.text_encoders if one.num_tokens is None and one.template is None)

    @property
    def tokenizers(self) -> dict[str, str]:
        """The names of its tokenizers, and of the text encoders that read their tokens."""
        return {one.tokenizer: one.name for one in self.components if one.tokenizer}

    @property
    def class_names(self) -> set[str]:
        """Of its pipelines, as ``model_index.json`` has them."""
        return {one.__name__ for one in (self.pipeline_class, *self.pipelines.values())}

    @property
    def bias(self) -> str:
        """The denoiser's parameter that a style term is baked into."""
        return f"{self.port}.bias"

    @property
    def lora_metadata(self) -> dict[str, str]:
        """What tells, in a LoRA's header, that it is of this family."""
        return {"modelspec.architecture": f"{self.architecture}/lora", "ss_base_model_version": self.kohya_name}

    def architecture_of(self, prediction_type: str | None) -> str:
        """What ``modelspec.architecture`` calls one that predicts this."""
        return self.v_architecture if prediction_type == "v_prediction" else self.architecture

    def width(self, denoiser: Any) -> int:
        """D, the width of a style term."""
        return int(denoiser.get_submodule(self.port).out_features)


def _family_named(name: str) -> Family:
    from dmm.families import FAMILIES

    return FAMILIES[name]
