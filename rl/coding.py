"""Sets of numbers in few bytes: the keys that tokens attended to, the ids they were drawn from.

A set of n numbers below a bound b is coded by Elias and Fano (Elias, J. ACM 21(2), 1974): the s low
bits of each number as they are, and the high parts, which ascend, as the ones of a bitmap of
n + b / 2^s bits. Where a quarter of the numbers or more are in the set, a bitmap of b bits is
shorter, and no set needs more. The empty set and that of all numbers take nothing.

2,048 of 32,768 keys take 1,536 bytes. The bound of information theory is 1,381; a list of int32
takes 8,192.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

# Numbers that are worked on at a time, at most, or those of a token: no intermediate array is
# large, and the bits of their codes, at most four a number, are counted in int32.
BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class CodedSets:
    """Sets of numbers, L of them for each of T tokens, on the host.

    Attributes:
      bounds_T: int32, what all numbers in the sets of a token are below.
      counts_TL: how many numbers are in each set, of an unsigned type.
      width: how many numbers a set may have, that of `lists`.
      high, low: uint8, the codes of the sets one after the other, each in whole bytes: the bitmaps
        of the high parts, and the low bits.
    """

    bounds_T: np.ndarray
    counts_TL: np.ndarray
    width: int
    high: np.ndarray
    low: np.ndarray

    @classmethod
    def of_lists(cls, lists_TLk: np.ndarray, bounds_T: np.ndarray, width: int) -> "CodedSets":
        """Codes sets that are given as lists of ascending numbers, then -1.

        Args:
          lists_TLk: the lists, k need not be the width.
          bounds_T, width: see the attributes.
        """
        parts = []
        T, L, k = lists_TLk.shape
        for tokens in _blocks(T, L, k):
            lists, bounds = lists_TLk[tokens], bounds_T[tokens]
            given = lists >= 0
            counts_TL = np.sum(given, axis=-1)
            given &= _is_coded(counts_TL, bounds[:, None])[..., None]
            parts.append(cls.of_numbers(lists[given], counts_TL, bounds, width))
        return cls.joined(parts)

    @classmethod
    def of_numbers(
        cls, numbers: np.ndarray, counts_TL: np.ndarray, bounds_T: np.ndarray, width: int
    ) -> "CodedSets":
        """Codes sets that are given as the ascending numbers of one after the other.

        Those of sets that have every number below their bound are left out of `numbers`.
        """
        bounds_R = np.repeat(bounds_T, counts_TL.shape[1])
        code = _Code.of(counts_TL.reshape(-1), bounds_R)
        high, low = code.encode(numbers)
        kind = np.min_scalar_type(int(np.max(bounds_T, initial=0)))
        return cls(bounds_T.astype(np.int32), counts_TL.astype(kind), width, high, low)

    @classmethod
    def of_all(cls, tokens: int, layers: int, bound: int) -> "CodedSets":
        """Returns sets that have every number below the bound."""
        bounds_T, nothing = np.full(tokens, bound, np.int32), np.zeros(0, np.uint8)
        kind = np.min_scalar_type(bound)
        return cls(bounds_T, np.full((tokens, layers), bound, kind), bound, nothing, nothing)

    @classmethod
    def joined(cls, parts: Sequence["CodedSets"]) -> "CodedSets":
        """Returns the sets of the tokens of one part after the other; at least one part."""
        bounds_T, counts_TL, high, low = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("bounds_T", "counts_TL", "high", "low")
        )
        return cls(bounds_T, counts_TL, parts[0].width, high, low)

    def __len__(self) -> int:
        """T, the number of tokens."""
        return len(self.bounds_T)

    @property
    def nbytes(self) -> int:
        """The bytes of all of it."""
        arrays = self.bounds_T, self.counts_TL, self.high, self.low
        return sum(array.nbytes for array in arrays)

    def between(self, start: int, stop: int) -> "CodedSets":
        """Returns the sets of the tokens from `start` on and before `stop`."""
        (sets,) = self.cut([slice(start, stop)])
        return sets

    def cut(self, parts: Iterable[slice]) -> Iterator["CodedSets"]:
        """Yields the sets of some of the tokens after those of others."""
        code = self._code()
        high_ends_T, low_ends_T = (
            np.pad(np.cumsum(bytes_R.reshape(self.counts_TL.shape).sum(axis=1)), (1, 0))
            for bytes_R in (code.high_bytes_R, code.low_bytes_R)
        )
        for part in parts:
            yield CodedSets(
                self.bounds_T[part],
                self.counts_TL[part],
                self.width,
                self.high[high_ends_T[part.start] : high_ends_T[part.stop]],
                self.low[low_ends_T[part.start] : low_ends_T[part.stop]],
            )

    def extended(self, tokens: int) -> "CodedSets":
        """Returns the sets with those of more tokens behind them, which are empty."""
        more = tokens - len(self)
        return dataclasses.replace(
            self,
            bounds_T=np.pad(self.bounds_T, (0, more), constant_values=1),
            counts_TL=np.pad(self.counts_TL, [(0, more), (0, 0)]),
        )

    def lists(self) -> np.ndarray:
        """Returns the sets as lists [T, L, width] of ascending numbers, then -1, int32."""
        lists_TLk = np.full((*self.counts_TL.shape, self.width), -1, np.int32)
        places = np.arange(self.width, dtype=np.int32)
        blocks = list(_blocks(len(self), self.counts_TL.shape[1], self.width))
        for tokens, sets in zip(blocks, self.cut(blocks), strict=True):
            block = lists_TLk[tokens]
            counts_TL1, bounds_T11 = sets.counts_TL[..., None], sets.bounds_T[:, None, None]
            given = places < counts_TL1
            block[given & _is_coded(counts_TL1, bounds_T11)] = sets._numbers()
            np.copyto(block, places, where=given & (counts_TL1 == bounds_T11))
        return lists_TLk

    def numbers(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yields (tokens, set, number) of all sets that have some numbers and not all.

        A set's number counts those of these tokens, L a token.
        """
        blocks = list(_blocks(len(self), self.counts_TL.shape[1], self.width))
        for tokens, sets in zip(blocks, self.cut(blocks), strict=True):
            counts_R = sets._code().counts_R
            yield tokens, np.repeat(np.arange(len(counts_R)), counts_R), sets._numbers()

    def _code(self) -> "_Code":
        bounds_R = np.repeat(self.bounds_T, self.counts_TL.shape[1])
        return _Code.of(self.counts_TL.reshape(-1), bounds_R)

    def _numbers(self) -> np.ndarray:
        """Returns the numbers of the sets that have a code, as `of_numbers` takes them."""
        return self._code().decode(self.high, self.low)


def largest_code(count: int, bound: int) -> int:
    """Returns the bytes that a set of at most so many numbers below a bound takes at most.

    They are those of its code and of its number of numbers.
    """
    counts_R = np.arange(min(count, bound) + 1)
    code = _Code.of(counts_R, np.full_like(counts_R, bound))
    return int(np.max(code.high_bytes_R + code.low_bytes_R)) + np.min_scalar_type(bound).itemsize


def _blocks(tokens: int, layers: int, width: int) -> Iterator[slice]:
    """Yields which tokens to work on at a time, where a set may have so many numbers.

    There is at least one, of no token if there is none.
    """
    each = max(BLOCK // max(width * layers, 1), 1)
    for start in range(0, max(tokens, 1), each):
        yield slice(start, min(start + each, tokens))


def _is_coded(counts: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    return (counts > 0) & (counts < bounds)


@dataclasses.dataclass(frozen=True)
class _Code:
    """How R sets are coded; those that are empty or have all numbers are not, and take no bytes.

    Attributes:
      counts_R: int64, how many numbers each has; 0 where it is not coded.
      shifts_R: how many low bits are kept apart; 0 for a bitmap.
      high_bytes_R, low_bytes_R: the bytes of both parts.
    """

    counts_R: np.ndarray
    shifts_R: np.ndarray
    high_bytes_R: np.ndarray
    low_bytes_R: np.ndarray

    @classmethod
    def of(cls, counts_R: np.ndarray, bounds_R: np.ndarray) -> "_Code":
        bounds_R = bounds_R.astype(np.int64)
        counts_R = np.where(_is_coded(counts_R, bounds_R), counts_R, 0).astype(np.int64)
        # floor(log2(b / n)): the s with the fewest bits, n (s + 1) + b / 2^s. One of 1 has no fewer
        # than a bitmap.
        shifts_R = np.frexp(bounds_R // np.maximum(counts_R, 1))[1] - 1
        shifts_R = np.where((counts_R > 0) & (shifts_R > 1), shifts_R, 0)
        bits_R = np.where(shifts_R > 0, counts_R + ((bounds_R - 1) >> shifts_R), bounds_R)
        high_bytes_R = np.where(counts_R > 0, -(-bits_R // 8), 0)
        return cls(counts_R, shifts_R, high_bytes_R, -(-counts_R * shifts_R // 8))

    def encode(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the codes `high` and `low` of the numbers of one coded set after the other."""
        high = np.empty(np.sum(self.high_bytes_R), np.uint8)
        low = np.empty(np.sum(self.low_bytes_R), np.uint8)
        for shift, group, of_numbers, of_high, of_low in self._groups():
            own = numbers[of_numbers].astype(np.int32)
            bits = np.zeros(8 * np.sum(group.high_bytes_R), np.uint8)
            bits[group.first_bits() + (own >> shift)] = 1
            high[of_high] = np.packbits(bits)
            if shift:
                low[of_low] = _pack_low(own, group.counts_R, shift)
        return high, low

    def decode(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Returns the numbers of one coded set after the other, int32."""
        numbers = np.empty(np.sum(self.counts_R), np.int32)
        for shift, group, of_numbers, of_high, of_low in self._groups():
            places = np.flatnonzero(np.unpackbits(high[of_high]).view(bool)).astype(np.int32)
            places -= group.first_bits()
            if shift:
                places = (places << shift) | _unpack_low(low[of_low], group.counts_R, shift)
            numbers[of_numbers] = places
        return numbers

    def _groups(self) -> Iterator[tuple[int, "_Code", np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (shift, the sets with it, the places of their numbers and of both codes)."""
        for shift in np.unique(self.shifts_R[self.counts_R > 0]):
            chosen_R = (self.shifts_R == shift) & (self.counts_R > 0)
            group = _Code(*(value[chosen_R] for value in vars(self).values()))
            of_numbers = np.repeat(chosen_R, self.counts_R)
            of_high = np.repeat(chosen_R, self.high_bytes_R)
            yield int(shift), group, of_numbers, of_high, np.repeat(chosen_R, self.low_bytes_R)

    def first_bits(self) -> np.ndarray:
        """Returns where the bit of each number stands if its high part is 0; of one shift only."""
        first_R = (8 * (np.cumsum(self.high_bytes_R) - self.high_bytes_R)).astype(np.int32)
        if not self.shifts_R.any():
            return np.repeat(first_R, self.counts_R)
        # In unary code a number is as many places further on as there are numbers before it.
        before_R = (np.cumsum(self.counts_R) - self.counts_R).astype(np.int32)
        first = np.repeat(first_R - before_R, self.counts_R)
        return first + np.arange(len(first), dtype=np.int32)


def _pack_low(numbers: np.ndarray, counts_R: np.ndarray, shift: int) -> np.ndarray:
    """Packs the low bits of sets' numbers, each set in whole bytes."""
    kind = np.min_scalar_type((1 << shift) - 1)
    own = (numbers & ((1 << shift) - 1)).astype(kind)
    bits = ((own[:, None] >> np.arange(shift, dtype=kind)) & kind.type(1)).reshape(-1)
    used = _used_bits(counts_R, shift)
    if used is not None:
        padded = np.zeros(len(used), kind)
        padded[used] = bits
        bits = padded
    return np.packbits(bits)


def _unpack_low(low: np.ndarray, counts_R: np.ndarray, shift: int) -> np.ndarray:
    """Returns what `_pack_low` packed, of an unsigned type."""
    bits, used = np.unpackbits(low), _used_bits(counts_R, shift)
    bits = (bits if used is None else bits[used]).reshape(-1, shift)
    own = np.zeros(len(bits), np.min_scalar_type((1 << shift) - 1))
    for bit in range(shift):
        own |= bits[:, bit].astype(own.dtype) << own.dtype.type(bit)
    return own


def _used_bits(counts_R: np.ndarray, shift: int) -> np.ndarray | None:
    """Returns which bits of sets in whole bytes are used, bool; None if all are."""
    if not np.any(counts_R * shift % 8):
        return None
    sizes_2R = np.stack([counts_R * shift, -counts_R * shift % 8], axis=1).reshape(-1)
    return np.repeat(np.resize([True, False], len(sizes_2R)), sizes_2R)
