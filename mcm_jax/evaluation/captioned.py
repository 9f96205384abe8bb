"""Chooses the scores that compare a run's samples with their captions."""

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

# The score that a run on this data set gets by default.
_BY_DATASET = {avatars.NAME: ATTRIBUTES, nearest_of_ten.DATASET: NEAREST_OF_TEN}


class CaptionScores:
    """The scores for each data set, made once.

    Without --metrics, a run gets all scores that apply to its data set. If one of them can't be computed, a
    note says why.
    """

    def __init__(self, metrics: Sequence[str], *, explicit: bool, clip: Path | None = None):
        """Checks the flags, but loads nothing.

        Args:
          explicit: whether the user named the metrics.
          clip: directory of the CLIP for `clip_score`.

        Raises:
          InputError: `clip` is missing, or has no effect.
        """
        self._named, self._explicit, self._clip = metrics, explicit, clip
        if explicit and (CLIP_SCORE in metrics) != (clip is not None):
            raise InputError(f"--metrics={CLIP_SCORE} and --clip=DIRECTORY need each other; give both")
        self._made: dict[tuple[str, str], CaptionScore | None] = {}

    def check(self, info: layout.DatasetInfo) -> None:
        """Raises InputError if a score does not apply to a run on this data set, or lacks a file."""
        for name in self._names(info):
            if name != NEAREST_OF_TEN:
                self._score(name, info, None)
            elif info.dataset != nearest_of_ten.DATASET:
                raise InputError(
                    f"--metrics={name} applies only to runs on {nearest_of_ten.DATASET}; remove it"
                )

    def of(self, info: layout.DatasetInfo, extractor: Extractor) -> list[CaptionScore]:
        """The scores for a run on this data set.

        Args:
          extractor: computes the features of `nearest_of_ten`.
        """
        found = [self._score(name, info, extractor) for name in self._names(info)]
        return [score for score in found if score is not None]

    def _names(self, info: layout.DatasetInfo) -> list[str]:
        usual = {_BY_DATASET.get(info.dataset), CLIP_SCORE if self._clip else None}
        named = self._named if self._explicit else usual
        if info.encoding is not None:
            return [name for name in CAPTION_SCORES if name in named]
        if self._explicit or self._clip:
            for name in CAPTION_SCORES:
                if name in named:
                    raise InputError(
                        f"{name} applies only to runs that are conditioned on captions, not to one on "
                        f"{info.dataset}; evaluate it without"
                    )
        return []

    def _score(self, name: str, info: layout.DatasetInfo, extractor: Extractor | None) -> CaptionScore | None:
        key = name, "" if name == CLIP_SCORE else str(info.path)
        if key not in self._made:
            self._made[key] = self._make(name, info, extractor)
        return self._made[key]

    def _make(self, name: str, info: layout.DatasetInfo, extractor: Extractor | None) -> CaptionScore | None:
        if name == NEAREST_OF_TEN and extractor is not None:
            return NearestOfTen(info, extractor)
        if name == CLIP_SCORE and self._clip is not None:
            return ClipScore(self._clip)
        try:
            classifier = attributes.load(info)
        except attributes.MissingClassifierError as error:
            if self._explicit:
                raise
            distributed.say(f"note: without {ATTRIBUTES}: {error}")
            return None
        if omitted := classifier.omitted:
            distributed.say(f"note: {ATTRIBUTES} does not count {', '.join(omitted)}")
        return classifier
