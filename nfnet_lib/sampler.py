"""Which example comes when: a pure function of (seed, position), and the counter-based randomness that goes with it.

`position` counts the unique examples that the whole job has consumed since step 0. Epoch and example id follow from
it, so nothing depends on the number of hosts, of workers, or on the batch size, and the only state worth saving is one
integer. Every epoch visits every example exactly once, whatever was killed and resumed in between. (The paper's
F7+ runs lost that property at pre-emptions; arXiv 2310.16764, section 2.)

The order is a keyed pseudo-random permutation: a balanced Feistel network on the smallest domain of an even number of
bits that holds N, walked until it falls inside N (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
Memory is O(1) in N. Seed and epoch enter through a hash, so that seed 0's epoch 1 has nothing to do with seed 1's epoch 0.
"""

import functools
import hashlib
import operator

import numpy as np
from jaxtyping import Float64, Int, Int64, UInt64

VERSION = 1  # of the order and of the state; a new one makes old checkpoints unresumable, so it needs a reason
ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, the increment of splitmix64


def mix64(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words that avalanches well."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_words(*parts: object, count: int) -> UInt64[np.ndarray, " count"]:
    """`count` (at most 8) 64-bit words from blake2b of the parts' text. Text, so that no two tuples of parts collide."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8 * count).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def random_bits(
    stream: str, seed: int, positions: Int[np.ndarray, " n"], view: int | Int[np.ndarray, " n"], count: int
) -> UInt64[np.ndarray, "n count"]:
    """64 random bits for each (position, draw), a pure function of (stream, seed, position, view, draw).

    `stream` names the purpose: two purposes with the same seed share nothing. `view` is an integer or one per position.
    """
    key = hash_words("random_bits", VERSION, stream, seed, count=2)
    view = np.atleast_1d(np.asarray(view, np.int64)).astype(np.uint64)
    state = mix64(positions.astype(np.uint64) * GOLDEN + key[0])
    state = mix64((state ^ mix64(view * GOLDEN + key[1])) + GOLDEN)
    return mix64(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)


def uniforms(
    seed: int,
    positions: Int[np.ndarray, " n"],
    view: int | Int[np.ndarray, " n"],
    count: int,
    stream: str = "augment",
) -> Float64[np.ndarray, "n count"]:
    """Uniform draws in [0, 1), one row per position; the one source of randomness of host-side augmentation.

    A view of an example thus looks the same on any number of hosts and workers, and after any restart.
    """
    bits = random_bits(stream, seed, positions, view, count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class ExactlyOnceSampler:
    """Maps positions to example ids so that each epoch is a permutation of the (not excluded) examples.

    `num_examples` is the size of the data set, `exclude` the ids never to visit (near-duplicates of held-out images, say);
    `len(sampler)` is what remains, the length of an epoch. Memory is O(len(exclude)). Raises ValueError for an empty set.
    """

    def __init__(self, num_examples: int, seed: int, exclude: np.ndarray | None = None):
        self.num_examples, self.seed = operator.index(num_examples), operator.index(seed)
        if not 1 <= self.num_examples < 2**62:
            raise ValueError(f"num_examples={num_examples}: expected 1 to 2**62 - 1")
        ids = np.asarray([] if exclude is None else exclude)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"exclude has dtype {ids.dtype}: expected integer example ids")
        ids = np.unique(ids.astype(np.int64))
        if ids.size and not (0 <= ids[0] and ids[-1] < self.num_examples):
            raise ValueError(f"exclude has ids from {ids[0]} to {ids[-1]}: expected 0 to {self.num_examples - 1}")
        self._length = self.num_examples - ids.size
        if self._length == 0:
            raise ValueError(f"exclude names all {self.num_examples} examples: nothing is left to visit")
        self.excluded = ids.size
        self.exclude_hash = hashlib.blake2b(ids.tobytes(), digest_size=8).hexdigest() if ids.size else ""
        # The permutation is one of [0, length); in place of the excluded ids in there come the kept ones beyond.
        self._holes = ids[ids < self._length]
        self._substitutes = np.setdiff1d(np.arange(self._length, self.num_examples), ids, assume_unique=True)
        # Whether a stretch of ids has a hole: nearly all ids are settled by one look, in memory that caches hold.
        self._shift = max(0, (self._length - 1).bit_length() - max(1, ids.size).bit_length() - 4)
        self._has_hole = np.zeros(((self._length - 1) >> self._shift) + 1, bool)
        self._has_hole[self._holes >> self._shift] = True
        self._half_bits = np.uint64(max(1, ((self._length - 1).bit_length() + 1) // 2))

    def __len__(self) -> int:
        return self._length

    def example_ids(self, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """The ids of positions [start, stop), int64 [stop - start]. They may cross epochs: epoch = position // len(self)."""
        start, stop = operator.index(start), operator.index(stop)
        if not 0 <= start <= stop:
            raise ValueError(f"positions [{start}, {stop}): expected 0 <= start <= stop")
        ids, position = np.empty(stop - start, np.int64), start
        while position < stop:
            epoch, rank = divmod(position, self._length)
            end = min(stop, (epoch + 1) * self._length)
            ids[position - start : end - start] = self._permute(epoch, rank, rank + end - position)
            position = end
        return ids

    def process_ids(self, start: int, stop: int, process_index: int, process_count: int) -> Int64[np.ndarray, " n"]:
        """The contiguous part of positions [start, stop) that one process loads.

        Contiguous, so that the global batch has the same row order whatever the number of processes.
        """
        if process_count < 1 or not 0 <= process_index < process_count:
            raise ValueError(
                f"process_index={process_index}, process_count={process_count}: expected 0 <= index < count"
            )
        share, rest = divmod(stop - start, process_count)
        if rest:
            raise ValueError(f"{stop - start} examples a step do not divide among {process_count} processes")
        first = start + process_index * share
        return self.example_ids(first, first + share)

    def state(self, consumed: int, fingerprint: str = "") -> dict:
        """What a checkpoint keeps, as JSON values: the same on every process, and valid for any number of them.

        `consumed` is the position after the last step applied; `fingerprint` is the data source's.
        """
        if consumed < 0:
            raise ValueError(f"consumed={consumed}: expected a position >= 0")
        return {
            "version": VERSION,
            "n": self.num_examples,
            "seed": self.seed,
            "exclude": self.exclude_hash,
            "fingerprint": fingerprint,
            "consumed": int(consumed),
        }

    @staticmethod
    def check(
        state: dict, num_examples: int, seed: int, fingerprint: str = "", exclude: np.ndarray | None = None
    ) -> int:
        """Returns the saved position if `state` continues this stream of examples; raises ValueError otherwise."""
        return ExactlyOnceSampler(num_examples, seed, exclude).resume(state, fingerprint)

    def resume(self, state: dict, fingerprint: str = "") -> int:
        """The position at which `state` says to go on; ValueError, naming both values, if it is of another stream."""
        now = self.state(0, fingerprint)
        missing = sorted(now.keys() - state.keys())
        if missing:
            raise ValueError(
                f"sampler state lacks {', '.join(missing)}; it has {', '.join(sorted(state)) or 'nothing'}"
            )
        wrong = [f"{k}: saved {state[k]!r}, now {now[k]!r}" for k in now if k != "consumed" and state[k] != now[k]]
        if wrong:
            raise ValueError("the saved run drew its examples from other data or in another order; " + "; ".join(wrong))
        consumed = state["consumed"]
        if not isinstance(consumed, int) or isinstance(consumed, bool) or consumed < 0:
            raise ValueError(f"sampler state has consumed={consumed!r}: expected an integer >= 0")
        return consumed

    def _permute(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """Ids of ranks [start, stop) of one epoch."""
        keys = _round_keys(self.seed, epoch, self._length)
        ids = _feistel(np.arange(start, stop, dtype=np.uint64), keys, self._half_bits)
        length = np.uint64(self._length)
        outside = np.flatnonzero(ids >= length)
        while outside.size:  # cycle walking: fewer than 4 applications an id on average, as the domain is < 4 N
            ids[outside] = _feistel(ids[outside], keys, self._half_bits)
            outside = outside[ids[outside] >= length]
        ids = ids.astype(np.int64)
        if self._holes.size:
            near = np.flatnonzero(self._has_hole[ids >> self._shift])
            at = np.searchsorted(self._holes, ids[near])
            inside = self._holes[np.minimum(at, self._holes.size - 1)] == ids[near]
            ids[near[inside]] = self._substitutes[at[inside]]
        return ids


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int, length: int) -> UInt64[np.ndarray, " rounds"]:
    return hash_words("permutation", VERSION, seed, epoch, length, count=ROUNDS)


def _feistel(
    x: UInt64[np.ndarray, " n"], keys: UInt64[np.ndarray, " rounds"], half_bits: np.uint64
) -> UInt64[np.ndarray, " n"]:
    """A bijection of [0, 4^half_bits), for any keys."""
    mask = np.uint64((1 << int(half_bits)) - 1)
    left, right = x >> half_bits, x & mask
    for key in keys:
        left, right = right, left ^ (mix64(right * GOLDEN + key) & mask)
    return (left << half_bits) | right
