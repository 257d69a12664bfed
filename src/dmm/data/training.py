"""What the training loop reads: no VAE and no text encoder runs behind it."""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dmm.data.control_images import SHOWN, Condition
from dmm.data.encoding import check_size, encode_latents, encode_texts
from dmm.data.images import CaptionedImages, SomeImages, sort_by_shape
from dmm.data.rows import ALONE, Place, Rows
from dmm.data.synthesis import Share, Synthesis, share_out, synthesize
from dmm.errors import UserError
from dmm.families import Frame, family_of
from dmm.files.bars import PartsBar
from dmm.files.cache import cache_folder
from dmm.maths.buckets import Size
from dmm.models.conditioning import num_cut

STUDENT = "student"
"""Name of the student's text encoder, which is the base's."""


def reader_in(style: str) -> str:
    """Name of the student's text encoder as it reads in a style that changes it."""
    return f"{STUDENT}/{style}/text"


logger = logging.getLogger(__name__)


def student_in(style: str) -> str:
    """Name, which no teacher can have, of the student as it paints in a style."""
    return f"{STUDENT}/{style}"


class TrainingData:
    """M latents with captions, embedded as each text encoder does, read at random from disk.

    Args:
        latents: of each size, which rows have it, (R,) int64, and R rows of ``latents``; each of the M rows is in one.
        texts: by text encoder, U rows of what a denoiser reads of a caption; the first is the empty caption.
        caption_of: (M,) int64, which of the U is a row's caption.
        painted: by teacher or other painter, the rows that it painted.
        shown: by ControlNet, M rows of the image that it is shown; of models, nothing.
        size: of each of these, what a denoiser reads of the pictures' size, without the rows' dimension.

    Attributes:
        num_rows: M.
        sizes: the rows of each size, (R,) int64.
    """

    def __init__(
        self,
        latents: Sequence[tuple[Tensor, Rows]],
        texts: Mapping[str, Rows],
        caption_of: Tensor,
        painted: Mapping[str, range],
        size: Sequence[Mapping[str, Tensor]],
        shown: Mapping[str, Rows] = MappingProxyType({}),
    ) -> None:
        self.sizes = [rows for rows, _ in latents]
        assert all(len(rows) == len(stored) for rows, stored in latents)
        assert torch.equal(torch.cat(self.sizes).sort().values, torch.arange(len(caption_of)))
        self._latents = [stored for _, stored in latents]
        self._size_of = torch.empty(len(caption_of), dtype=torch.int64)
        self._place_of = torch.empty(len(caption_of), dtype=torch.int64)
        for index, rows in enumerate(self.sizes):
            self._size_of[rows], self._place_of[rows] = index, torch.arange(len(rows))
        self._texts = dict(texts)
        self._caption_of = caption_of
        self._painted = dict(painted)
        self._shown = dict(shown)
        self._size = [dict(one) for one in size]
        self.num_rows = len(caption_of)

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w), of the first size."""
        _, channels, height, width = self.latents(self.sizes[0][:1]).shape
        return channels, height, width

    def rows_of(self, painter: str) -> Tensor:
        """The images that a teacher, or another, painted, none where it does not paint: (R,) int64, increasing."""
        rows = self._painted.get(painter, range(0))
        return torch.arange(rows.start, rows.stop)

    def latents(self, rows: Tensor) -> Tensor:
        """Clean latents.

        Args:
            rows: (B,) int64, of one size.
        Returns: (B, C, h, w), float32, on the CPU.
        """
        return self._latents[self._one_size(rows)].read(self._place_of[rows.cpu()])["latents"]

    def conditioning(self, encoder: str, rows: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """What a denoiser reads of the captions, and of the pictures' size.

        Args:
            encoder: ``student``, :func:`reader_in` a style that changes it, or a teacher's name: whose text encoders.
            rows: (B,) int64.
            dropped: (B,) bool, whose caption is the empty one instead. Give student and teacher the same.
        Returns: by flat names, such as ``encoder_hidden_states``, (B, T, D); float32, on the CPU.
        """
        texts = self._texts[encoder].read(self._caption_of[rows.cpu()].masked_fill(dropped.cpu(), 0))
        size = self._size[self._one_size(rows)]
        return texts | {name: of_all.expand(len(rows), *of_all.shape) for name, of_all in size.items()}

    def _one_size(self, rows: Tensor) -> int:
        (size,) = self._size_of[rows.cpu()].unique().tolist()
        return int(size)

    def shown(self, rows: Tensor, styles: Sequence[str]) -> dict[str, Tensor]:
        """What the teacher of each sample's style reads beside the caption: a ControlNet its image, a model nothing.

        Args:
            rows: (B,) int64.
            styles: B names.
        Returns: keyword arguments of a ControlNet, ``controlnet_cond``, (B, 3, H, W) float32 in [0, 1]; or none.
        """
        if not self._shown:
            return {}
        images: dict[int, Tensor] = {}
        for name in dict.fromkeys(styles):
            places = [place for place, style in enumerate(styles) if style == name]
            images |= zip(places, self._shown[name].read(rows.cpu()[places])[SHOWN], strict=True)
        return {SHOWN: torch.stack([images[place] for place in range(len(styles))]) / 255}


def prepare_data(
    source: CaptionedImages | Synthesis,
    base: Any,
    teachers: Mapping[str, Callable[[], Any]],
    *,
    size: int,
    buckets: Sequence[Size] = (),
    frame: Frame | None = None,
    cache: Path | None = None,
    clip_skips: Mapping[str, int] | None = None,
    conditions: Mapping[str, Condition] | None = None,
    readers: Mapping[str, Callable[[], Any]] = MappingProxyType({}),
    place: Place = ALONE,
    show_progress: bool = True,
) -> TrainingData:
    """Encode all that training will read, as far as no earlier run has.

    Called in every process of a run; they share the work, and none may read what is returned before all are done.

    Args:
        source: images with captions, or how the teachers paint some. Painted rows are ordered by teacher.
        base: a pipeline with the student's VAE and text encoder, on the device they shall run on.
        teachers: by name, in order, what opens the teacher's pipeline; one is open at a time, and each
            computes on its own device and in its own precision.
        size: pixels a side.
        buckets: sizes that images are sorted into by their shape, in place of ``size``.
        frame: what the models are told of the pictures' size, where they read one; by default that they never were
            larger.
        cache: folder of the cache, by default the user's.
        clip_skips: of the teachers, and of the ``student``, that leave out layers of their text encoder.
        conditions: of ControlNets, by name, what each is shown of an image.
        readers: what opens further pipelines that read the captions, by name, such as :func:`reader_in`.
        place: this process's, among those that share the work.
        show_progress: bars on stderr.
    Raises: UserError: the size does not suit a model, an image is damaged, a model overflows, the cache cannot be
        written, or a teacher is called ``student``.
    """
    if STUDENT in teachers:
        raise UserError(f"No teacher can be called '{STUDENT}': choose another name.")
    check_size(base.vae, size)
    cache = cache_folder("encodings") if cache is None else cache
    clip_skips = clip_skips or {}
    shares: list[Share] = []
    of_teacher: dict[str, range] = {}
    if isinstance(source, Synthesis):
        shares = share_out(source, len(teachers))
        captions = [prompt for share in shares for prompt in share.prompts]
        ends = list(itertools.accumulate(len(share.prompts) for share in shares))
        of_teacher = {name: range(start, end) for name, start, end in zip(teachers, [0, *ends], ends, strict=False)}
    else:
        captions = list(source.captions)
    distinct = list(dict.fromkeys(["", *captions]))
    cut = num_cut(base, distinct)
    if cut and place.index == 0:
        logger.warning("The text encoder does not read the end of %d of the %d captions.", cut, len(distinct))

    def read_captions(name: str, pipeline: Any) -> Rows:
        with _bar(place.rows(len(distinct)), " captions", name, show_progress, leave=False) as bar:
            return encode_texts(pipeline, distinct, cache, bar.update, place, clip_skip=clip_skips.get(name))

    # the first shard of each teacher's is another process's, or the first process would paint the most
    places = [Place((place.index + index) % place.count, place.count) for index in range(len(teachers))]
    if shares:
        mine = sum(there.rows(len(share.prompts)) for there, share in zip(places, shares, strict=True))
    else:
        mine = place.rows(len(captions))
    painted: list[Rows] = []
    title = "images" if place.count == 1 else f"images of process {place.index + 1} of {place.count}"
    with _bar(mine, " images", title, show_progress, leave=True) as bar:
        texts = {STUDENT: read_captions(STUDENT, base)}
        texts |= {name: read_captions(name, open_reader()) for name, open_reader in readers.items()}
        for index, (name, open_teacher) in enumerate(teachers.items()):
            pipeline = open_teacher()
            with _naming(name):
                texts[name] = read_captions(name, pipeline)
                if isinstance(source, Synthesis):
                    clip_skip = clip_skips.get(name)
                    asked = (shares[index], source, size, cache, bar.update, places[index])
                    painted.append(synthesize(pipeline, base.vae, *asked, clip_skip=clip_skip))
            del pipeline  # before the next one is opened
        sizes = {(size, size): torch.arange(len(captions))}
        if isinstance(source, Synthesis):
            stored = [Rows([shard for rows in painted for shard in rows.shards])]
        elif buckets:
            digests = source.digests(cache)
            sizes = {one: torch.tensor(rows) for one, rows in sort_by_shape(source, buckets).items()}
            stored = [
                encode_latents(base.vae, SomeImages(source, rows.tolist(), digests), one, cache, bar.update, place)
                for one, rows in sizes.items()
            ]
        else:
            stored = [encode_latents(base.vae, source, (size, size), cache, bar.update, place)]
    latents = list(zip(sizes.values(), stored, strict=True))
    shown = {}
    for name, condition in (conditions or {}).items():
        title = f"what {name} is shown"
        with _bar(place.rows(len(captions)), " images", title, show_progress, leave=False) as bar, _naming(name):
            shown[name] = condition.rows(source, stored[0], base.vae, size, cache, bar.update, place)
    index_of = {caption: index for index, caption in enumerate(distinct)}
    caption_of = torch.tensor([index_of[caption] for caption in captions])
    read = [family_of(base).read_size(frame or Frame.whole(*one)) for one in sizes]
    return TrainingData(latents, texts, caption_of, of_teacher, read, shown)


@contextmanager
def _naming(teacher: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"teacher '{teacher}': {error}") from error


def _bar(total: int, unit: str, title: str, shown: bool, *, leave: bool) -> Any:
    return PartsBar(total, unit, title, disable=not shown, leave=leave)
