"""Chooses the scores by captions that a run's samples get."""

from collections.abc import Sequence

from mcm_jax.data import avatars, layout
from mcm_jax.evaluation import attributes, nearest_of_ten
from mcm_jax.evaluation.caption_scores import CaptionScore
from mcm_jax.evaluation.clip_score import ClipScore
from mcm_jax.evaluation.features import Extractor
from mcm_jax.evaluation.nearest_of_ten import NearestOfTen
from mcm_jax.records import ATTRIBUTES, CAPTION_SCORES, CLIP_SCORE, NEAREST_OF_TEN
from mcm_jax.system import distributed
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path


class Scores:
    """The scores by captions for each data set, made once.

    Without --metrics, a run gets all that apply to its data set; what they lack is a note.
    """

    def __init__(
        self, metrics: Sequence[str], extractor: Extractor, *, explicit: bool, clip: Path | None = None
    ):
        """Chooses, but loads nothing.

        Args:
          extractor: computes the features of `nearest_of_ten`.
          explicit: whether the user named the metrics.
          clip: directory of the CLIP for `clip_score`.
        """
        self._extractor, self._clip = extractor, clip
        self._named, self._explicit = [name for name in CAPTION_SCORES if name in metrics], explicit
        self._made: dict[tuple[str, str], CaptionScore | None] = {}

    def of(self, info: layout.DatasetInfo) -> list[CaptionScore]:
        """The scores for a run on this data set.

        Raises:
          InputError: the user named a score that does not apply, or what it needs is missing or damaged.
        """
        names = self._named if self._explicit else self._usual(info)
        found = []
        for name in names:
            if info.encoding is None:
                raise InputError(f"--metrics={name} applies only to runs that are conditioned on captions")
            key = name, str(info.path)
            if key not in self._made:
                self._made[key] = self._make(name, info)
            found.append(self._made[key])
        return [score for score in found if score is not None]

    def _make(self, name: str, info: layout.DatasetInfo) -> CaptionScore | None:
        try:
            if name == NEAREST_OF_TEN:
                return NearestOfTen(info, self._extractor)
            if name == CLIP_SCORE:
                if self._clip is None:
                    raise InputError(
                        f"--metrics={CLIP_SCORE} needs --clip=DIRECTORY with the files of a CLIP"
                    )
                return ClipScore(self._clip)
            return attributes.load(info)
        except attributes.MissingClassifierError as error:
            if self._explicit:
                raise
            distributed.say(f"note: {error}")
            return None

    def _usual(self, info: layout.DatasetInfo) -> list[str]:
        """The scores that a run on this data set gets by default."""
        if info.encoding is None:
            return []
        by_dataset = {avatars.NAME: [ATTRIBUTES], nearest_of_ten.DATASET: [NEAREST_OF_TEN]}
        return by_dataset.get(info.dataset, []) + ([] if self._clip is None else [CLIP_SCORE])
