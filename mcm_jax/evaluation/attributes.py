"""Finds the attributes of avatars in images, which scores samples by what their captions say.

A small convolutional network names the style of a drawing and the value of each of the style's attributes.
`train` trains it once on drawings, whose captions name every attribute, and measures it on the splits `test`
and `heldout`. An attribute counts only if the network is right on over 99% of the drawings in both. The style
must be among them.

The network must see the pairs of values that no generative model is trained on. Otherwise it concludes from
one value that the other is absent: trained on split `train` alone, it found the surface of half of the
held-out planets. So it may be trained on combinations of split `heldout`, which only the generative models
must not know.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32, Key, PyTree, UInt8

from mcm_jax.data import avatars, layout, pipeline
from mcm_jax.data.avatar_styles import STYLES
from mcm_jax.data.pixels import to_float
from mcm_jax.evaluation import caption_scores
from mcm_jax.records import ATTRIBUTES
from mcm_jax.system import files, json_text, progress
from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.paths import Path
from mcm_jax.system.tensors import TensorFile

STYLE = "style"
LEAST_ACCURACY = 0.99
EPOCHS = 4
# The first convolution reduces larger images to about this height and width, so that they cost no more.
_SIDE = 16
_WIDTHS, _HIDDEN = (32, 64, 128), 256
# Number of further drawings with held-out pairs; at most as many as in split `train`.
_HELD_OUT = 10_000
_BATCH, _LEARNING_RATE = 128, 2e-3
# Samples are less clean than drawings: noise of up to this deviation is added, to pixels in [-1, 1].
_NOISE = 0.15
_UNKNOWN = -1  # The answer to a question about another style.
_SPLITS = ("test", layout.HELD_OUT)


@dataclasses.dataclass(frozen=True)
class Question:
    """What the network answers for each image: its style, or an attribute that drawings of one style have."""

    name: str  # 'style', or 'critters.color'
    values: tuple[str, ...]


@functools.cache
def questions() -> tuple[Question, ...]:
    """The style, then all attributes of all styles."""
    attributes = [
        Question(f"{style}.{name}", tuple(attribute.values))
        for style, described in STYLES.items()
        for name, attribute in described.attributes.items()
    ]
    return (Question(STYLE, tuple(STYLES)), *attributes)


def answers(captions: Sequence[str]) -> Int32[np.ndarray, "N Q"]:
    """The right answer to each question as an index into its values; -1 if the caption has none."""
    result = np.full((len(captions), len(questions())), _UNKNOWN, np.int32)
    for row, caption in zip(result, captions, strict=True):
        if (found := avatars.parse(caption)) is not None:
            style, attributes = found
            named = {STYLE: style} | {f"{style}.{name}": word for name, word in attributes.items()}
            for place, question in enumerate(questions()):
                if question.name in named:
                    row[place] = question.values.index(named[question.name])
    return result


class Network(nnx.Module):
    """Convolutions with layer norms and pooling; logits of the values of each question.

    Questions with fewer values than others have further logits of minus infinity.
    """

    def __init__(self, resolution: int, *, rngs: nnx.Rngs):
        pairs = [(3, _WIDTHS[0]), *itertools.pairwise(_WIDTHS)]
        widths = [each for inputs, width in pairs for each in ((inputs, width), (width, width))]
        stride = max(1, resolution // _SIDE)
        convs = [nnx.Conv(*widths[0], (stride + 2,) * 2, strides=(stride,) * 2, rngs=rngs)]
        self.convs = nnx.List(convs + [nnx.Conv(*each, (3, 3), rngs=rngs) for each in widths[1:]])
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _, width in widths])
        side = -(-resolution // (stride * 2 ** (len(_WIDTHS) - 1)))
        self.hidden = nnx.Linear(side**2 * _WIDTHS[-1], _HIDDEN, rngs=rngs)
        self.out = nnx.Linear(_HIDDEN, len(questions()) * _most_values(), rngs=rngs)

    def __call__(self, x: Float[Array, "B r r 3"]) -> Float[Array, "B Q V"]:
        """Pixels are in [-1, 1]."""
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if number and number % 2 == 0:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
            x = jax.nn.relu(norm(conv(x)))
        logits = self.out(jax.nn.relu(self.hidden(x.reshape(len(x), -1))))
        counts = np.array([len(question.values) for question in questions()])
        exists = np.arange(_most_values()) < counts[:, None]
        return jnp.where(exists, logits.reshape(len(x), *exists.shape), -jnp.inf)


def _most_values() -> int:
    return max(len(question.values) for question in questions())


@dataclasses.dataclass(frozen=True)
class Classifier:
    """The trained network.

    Attributes:
      params: its parameters.
      resolution: height and width of its images in pixels.
      data: a hash of the data set that it was trained for.
      accuracies: by split, the share of right answers to each question.
    """

    params: PyTree
    resolution: int
    data: str
    accuracies: Mapping[str, Mapping[str, float]]

    @property
    def name(self) -> str:
        """Name of the metric."""
        return ATTRIBUTES

    @property
    def counted(self) -> Bool[np.ndarray, " Q"]:
        """Which questions count: those that it answers well enough in all splits."""
        return np.array(
            [
                all(split[question.name] > LEAST_ACCURACY for split in self.accuracies.values())
                for question in questions()
            ]
        )

    @property
    def omitted(self) -> list[str]:
        """The questions that don't count."""
        return [
            question.name for question, counts in zip(questions(), self.counted, strict=True) if not counts
        ]

    @property
    def sha256(self) -> str:
        """A hash of the parameters and the questions that count."""
        digest = hashlib.sha256(json.dumps([self.counted.tolist(), self.resolution]).encode())
        for leaf in jax.tree.leaves(self.params):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def predictions(self, images: UInt8[np.ndarray, "N r r 3"]) -> Int32[np.ndarray, "N Q"]:
        """The network's answer to each question, those about other styles included."""
        apply = _apply(self.resolution)
        blocks = [np.zeros((0, len(questions())), np.int32)]
        for start in range(0, len(images), _BATCH):
            block = images[start : start + _BATCH]
            padded = np.pad(block, [(0, _BATCH - len(block)), (0, 0), (0, 0), (0, 0)])
            blocks.append(np.asarray(apply(self.params, padded))[: len(block)])
        return np.concatenate(blocks)

    def __call__(
        self, images: UInt8[np.ndarray, "N r r 3"], captions: Sequence[str]
    ) -> caption_scores.Points:
        """How many attributes of its caption each image shows, and how many the caption names.

        The style is one of them. In a drawing of another style, no attribute counts as found. Attributes that
        the network doesn't recognise well enough are in neither number.
        """
        truth = answers(captions)
        named = (truth != _UNKNOWN) & self.counted
        right = self.predictions(images) == truth
        right &= right[:, :1]
        return (right & named).sum(axis=1, dtype=float), named.sum(axis=1, dtype=float)


@functools.cache
def _graph(resolution: int) -> tuple[nnx.GraphDef[Network], PyTree]:
    return nnx.split(nnx.eval_shape(lambda: Network(resolution, rngs=nnx.Rngs(0))))


@functools.cache
def _apply(resolution: int) -> jax.stages.Wrapped:
    @jax.jit
    def apply(params: PyTree, images: UInt8[Array, "B r r 3"]) -> Int[Array, "B Q"]:
        return jnp.argmax(nnx.merge(_graph(resolution)[0], params)(to_float(images)), axis=2)

    return apply


def _loss(logits: Float[Array, "B Q V"], truth: Int[Array, "B Q"]) -> Float[Array, ""]:
    """The mean over images of the summed cross-entropies of the questions that have an answer."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(truth, 0))
    return jnp.where(truth == _UNKNOWN, 0.0, losses).sum(axis=1).mean()


def train(info: layout.DatasetInfo, *, epochs: int = EPOCHS, seed: int = 0) -> Classifier:
    """Trains the network on prepared avatars and measures it on the splits `test` and `heldout`.

    The drawings are those of split `train`, and further ones with held-out pairs.

    Raises:
      InputError: the data set has other images, or is damaged.
    """
    if info.dataset != avatars.NAME:
        raise InputError(f"--classifier applies only to avatars; {info.dataset} has no known attributes")
    parts = _examples(info, "train"), _held_out_examples(info)
    images, truth = (np.concatenate(each) for each in zip(*parts, strict=True))
    batch = min(_BATCH, len(images))
    steps = epochs * (len(images) // batch)
    rate = optax.warmup_cosine_decay_schedule(0.0, _LEARNING_RATE, steps // 10, steps)
    # At the full rate from the start, all units of the hidden layer may die in the first updates.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    network = Network(info.resolution, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(network)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(
        params: PyTree,
        state: optax.OptState,
        key: Key[Array, ""],
        images: UInt8[Array, "B r r 3"],
        truth: Int[Array, "B Q"],
    ) -> tuple[PyTree, optax.OptState]:
        level, noise = jax.random.split(key)
        deviations = jax.random.uniform(level, (len(images), 1, 1, 1), maxval=_NOISE)
        noisy = to_float(images) + deviations * jax.random.normal(noise, images.shape)
        gradient = jax.grad(lambda params: _loss(nnx.merge(graph, params)(noisy), truth))(params)
        changes, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, changes), state

    state, rng, order = optimizer.init(params), np.random.default_rng(seed), np.zeros(0, np.int64)
    for step in progress.bar(range(steps), "training the classifier"):
        if len(order) < batch:
            order = rng.permutation(len(images))
        chosen, order = order[:batch], order[batch:]
        key = jax.random.fold_in(jax.random.key(seed), step)
        params, state = update(params, state, key, images[chosen], truth[chosen])
    classifier = Classifier(jax.device_get(params), info.resolution, _identity(info), {})
    measured = {split: _accuracies(classifier, *_examples(info, split)) for split in _SPLITS}
    return dataclasses.replace(classifier, accuracies=measured)


def _examples(info: layout.DatasetInfo, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of a split, and the answers that their captions give."""
    source = caption_scores.open_split(info, split)
    images, _ = pipeline.load_arrays(source)
    return images, answers(source.captions(np.arange(len(source))))


def _held_out_examples(info: layout.DatasetInfo) -> tuple[np.ndarray, np.ndarray]:
    """Drawings with held-out pairs, numbered after those of split `heldout`, and their answers."""
    first = info.num_examples[layout.HELD_OUT]
    numbers = range(first, first + min(_HELD_OUT, info.num_examples["train"]))
    drawn = [avatars.draw(layout.HELD_OUT, number) for number in numbers]
    shown = progress.bar(drawn, "drawing held-out pairs")
    images = np.stack([avatars.render(avatar, resolution=info.resolution) for avatar in shown])
    return images, answers([avatar.caption for avatar in drawn])


def _accuracies(classifier: Classifier, images: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The share of right answers to each question; 0 for one that no image asks."""
    asked, right = truth != _UNKNOWN, classifier.predictions(images) == truth
    shares = (asked & right).sum(axis=0) / np.maximum(asked.sum(axis=0), 1)
    return {question.name: float(share) for question, share in zip(questions(), shares, strict=True)}


def _identity(info: layout.DatasetInfo) -> str:
    """A hash of the drawings of all splits, and of how they were drawn."""
    described = [info.fingerprints, info.preprocessing, info.source]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def path_of(info: layout.DatasetInfo) -> Path:
    """The file of the classifier for a data set."""
    return info.path.parents[2] / "attributes" / f"avatars_{info.resolution}.safetensors"


def write(classifier: Classifier, path: Path) -> None:
    """Writes a classifier as .safetensors, atomically."""
    described = {
        "resolution": classifier.resolution,
        "data": classifier.data,
        "questions": [dataclasses.asdict(question) for question in questions()],
        "accuracies": classifier.accuracies,
    }
    tensors = {_name(keys): np.asarray(leaf[...]) for keys, leaf in nnx.to_flat_state(classifier.params)}
    files.write_whole(path, safetensors.numpy.save(tensors, {"description": json.dumps(described)}))


class MissingClassifierError(InputError):
    """There is no classifier for this data set that finds enough attributes."""


def load(info: layout.DatasetInfo) -> Classifier:
    """Loads the classifier for a data set.

    Raises:
      MissingClassifierError: there is none, it is that of other drawings, or it does not recognise the style.
      InputError: the data set's captions name no attributes, or the file is damaged.
    """
    if info.dataset != avatars.NAME:
        raise InputError(f"--metrics={ATTRIBUTES} applies only to runs on {avatars.NAME}; remove it")
    path = path_of(info)
    where = {"dataset": info.dataset, "resolution": info.resolution}
    command = f"{layout.prepare_command(info.path.parents[2], **where)} --classifier"
    try:
        classifier = read(path)
    except FileNotFoundError:
        raise MissingClassifierError(f"there is no {path}; write it with: {command}") from None
    if classifier.data != _identity(info):
        raise MissingClassifierError(f"{path} was trained on other drawings; train it again: {command}")
    if not classifier.counted[0]:
        raise MissingClassifierError(f"{path} does not recognise the style; train it on more drawings")
    return classifier


def read(path: Path) -> Classifier:
    """Reads what `write` has written.

    Raises:
      FileNotFoundError: there is no such file.
      InputError: it is damaged, or its questions are those of another version.
    """
    content = files.read_bytes(path)
    remedy = "delete it and train the classifier again"
    try:
        file = TensorFile(io.BytesIO(content))
        described = json_text.loads(file.metadata["description"])
        asked = [Question(one["name"], tuple(one["values"])) for one in described["questions"]]
        current = tuple(asked) == questions()
        found = _parameters(file, described["resolution"]) if current else None
        accuracies = {
            split: {question.name: float(shares[question.name]) for question in asked}
            for split, shares in described["accuracies"].items()
        }
        classifier = Classifier(found, described["resolution"], str(described["data"]), accuracies)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({reason(error)}); {remedy}") from error
    if not current:
        raise InputError(f"{path} asks for attributes of another version; {remedy}")
    return classifier


def _parameters(file: TensorFile, resolution: int) -> PyTree:
    """The network's parameters; raises KeyError or ValueError if they are not in the file."""
    found = []
    for keys, variable in nnx.to_flat_state(_graph(resolution)[1]):
        tensor = file.read(_name(keys))
        if tensor.shape != variable.shape:
            raise ValueError(f"{_name(keys)} has shape {tensor.shape}, not {variable.shape}")
        found.append((keys, variable.replace(tensor)))
    return nnx.from_flat_state(found)


def _name(keys: Sequence[object]) -> str:
    return ".".join(map(str, keys))


def report(classifier: Classifier) -> str:
    """Formats the accuracies: one line per question, the omitted ones marked."""
    lines = [f"{'':<24}" + "".join(f"{split:>10}" for split in classifier.accuracies)]
    for question, counts in zip(questions(), classifier.counted, strict=True):
        shares = "".join(f"{split[question.name]:>10.2%}" for split in classifier.accuracies.values())
        lines.append(
            f"{question.name:<24}{shares}{'' if counts else f'   omitted: not over {LEAST_ACCURACY:.0%}'}"
        )
    return "\n".join(lines)
