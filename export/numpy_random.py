"""NumPy's normal numbers in a TensorFlow graph: `np.random.default_rng(key).standard_normal(shape, dtype="float32")`.

The noise of a picture is defined by NumPy, so that every backend, the client and the server draw the same picture from
a seed. Three steps, each on whole arrays: the key is hashed to a state, the state is advanced to every place of the
stream at once, and the stream is cut into draws, of which one in a hundred takes more than one place.

References: O'Neill (2014), PCG: A Family of Simple Fast Space-Efficient Statistically Good Algorithms, HMC-CS-2014-0905
(PCG XSL RR 128/64), and https://www.pcg-random.org/posts/developing-a-seed_seq-alternative.html (the hash of the key);
Marsaglia & Tsang (2000), The Ziggurat Method for Generating Random Variables, J. Stat. Softw. 5(8); Doornik (2005), An
Improved Ziggurat Method to Generate Normal Random Samples (a table of 256).
"""

import decimal
import functools

import numpy as np
import tensorflow as tf

# === The hash of the key ===

INIT_A, MULTIPLY_A, INIT_B, MULTIPLY_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
MIX_LEFT, MIX_RIGHT = 0xCA01F9DD, 0x4973F715
POOL = 4


def _hash_constants(first, factor, count):
    """Pairs (xor with, multiply by) that a chain of `count` hashes goes through."""
    constants = [first]
    for _ in range(count):
        constants.append(constants[-1] * factor % 2**32)
    return [(tf.constant(a, tf.uint32), tf.constant(b, tf.uint32)) for a, b in zip(constants, constants[1:])]


def _hash(value, constants):
    value = (value ^ constants[0]) * constants[1]
    return value ^ tf.bitwise.right_shift(value, tf.constant(16, tf.uint32))


def _mix(left, right):
    value = tf.constant(MIX_LEFT, tf.uint32) * left - tf.constant(MIX_RIGHT, tf.uint32) * right
    return value ^ tf.bitwise.right_shift(value, tf.constant(16, tf.uint32))


def _state(key):
    """uint32 keys (B, 1 … 4) → state and increment, each (high, low) uint64 (B,), as in NumPy's SeedSequence."""
    words = tf.unstack(tf.pad(key, [[0, 0], [0, POOL - key.shape[1]]]), axis=1)
    chain = iter(_hash_constants(INIT_A, MULTIPLY_A, POOL + POOL * (POOL - 1)))
    pool = [_hash(word, next(chain)) for word in words]
    for source in range(POOL):
        for target in range(POOL):
            if source != target:
                pool[target] = _mix(pool[target], _hash(pool[source], next(chain)))
    chain = _hash_constants(INIT_B, MULTIPLY_B, 8)
    halves = [tf.cast(_hash(pool[i % POOL], chain[i]), tf.uint64) for i in range(8)]
    words = [halves[2 * i] | tf.bitwise.left_shift(halves[2 * i + 1], _u64(32)) for i in range(4)]
    start, sequence = (words[0], words[1]), (words[2], words[3])
    one = _u64(1)
    top = tf.bitwise.right_shift(sequence[1], _u64(63))
    increment = (tf.bitwise.left_shift(sequence[0], one) | top, tf.bitwise.left_shift(sequence[1], one) | one)
    return _add(_multiply(_add(increment, start), _constant(MULTIPLIER)), increment), increment


# === The stream: PCG64 ===

MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645


def _u64(value):
    return tf.constant(value, tf.uint64)


def _constant(value):
    return _u64(value >> 64), _u64(value % 2**64)


def _add(a, b):
    low = a[1] + b[1]
    return a[0] + b[0] + tf.cast(low < a[1], tf.uint64), low


def _multiply(a, b):
    """128-bit product of (high, low) pairs of uint64, modulo 2 ** 128."""
    mask, half = _u64(2**32 - 1), _u64(32)
    (a1, a0), (b1, b0) = ((tf.bitwise.right_shift(x, half), x & mask) for x in (a[1], b[1]))
    low, middle_a, middle_b = a0 * b0, a1 * b0, a0 * b1
    middle = tf.bitwise.right_shift(low, half) + (middle_a & mask) + (middle_b & mask)
    carried = tf.bitwise.right_shift(middle_a, half) + tf.bitwise.right_shift(middle_b, half)
    high = a1 * b1 + carried + tf.bitwise.right_shift(middle, half)
    return high + a[0] * b[1] + a[1] * b[0], a[1] * b[1]


def _words(state, increment, count):
    """The first words of a stream: uint32 (B, at least `count`)."""
    steps = (count + 1) // 2
    # doubling: the states of places 0 … k-1 give those of k … 2k-1, k places on. The jump is x → factor·x + offset
    factor, offset = _constant(MULTIPLIER), increment
    states = tuple(x[:, None] for x in _add(_multiply(state, factor), increment))

    def double(states, factor, offset):
        ahead = _add(_multiply(states, factor), tuple(x[:, None] for x in offset))
        offset = _add(_multiply(offset, factor), offset)
        return tuple(tf.concat([x, y], 1) for x, y in zip(states, ahead)), _multiply(factor, factor), offset

    places = tf.TensorShape([None, None])
    (high, low), _, _ = tf.while_loop(
        lambda states, factor, offset: tf.shape(states[0])[1] < steps,
        double,
        (states, factor, offset),
        ((places, places), (tf.TensorShape([]),) * 2, (tf.TensorShape([None]),) * 2),
    )
    value, turn = high ^ low, tf.bitwise.right_shift(high, _u64(58))
    back = (_u64(64) - turn) & _u64(63)  # a shift by 64 is undefined
    output = tf.bitwise.right_shift(value, turn) | tf.bitwise.left_shift(value, back)
    pair = tf.stack([output & _u64(2**32 - 1), tf.bitwise.right_shift(output, _u64(32))], axis=-1)
    return tf.reshape(tf.cast(pair, tf.uint32), [tf.shape(pair)[0], -1])


# === The draws: the ziggurat ===

RIM = "3.6541528853610087963519472518"  # where the tail begins
TAIL_TRIALS = 8  # one draw in 10^12 would need more


@functools.cache
def _ziggurat():
    """Widths that are accepted at once (uint32), widths (float32), heights (float32), each (256,), and the rim."""
    with decimal.localcontext(decimal.Context(prec=50)):
        rim, unit = decimal.Decimal(RIM), decimal.Decimal(2) ** 23
        height = lambda x: (-x * x / 2).exp()  # noqa: E731
        fraction = rim
        for k in range(400, 0, -1):  # continued fraction of the tail's area, ∫ exp(-x²/2) from the rim on
            fraction = rim + k / fraction
        area = rim * height(rim) + height(rim) / fraction
        edges = [rim]
        for _ in range(254):
            x = edges[-1]
            edges.append((-2 * (area / x + height(x)).ln()).sqrt())
        edges = [decimal.Decimal(0), *edges[::-1]]  # edges[i], i = 0 … 255; the rim last
        base = area / height(rim)
        at_once = [rim / base, 0, *(edges[i - 1] / edges[i] for i in range(2, 256))]
        widths = [base / unit, *(x / unit for x in edges[1:])]
        heights = [decimal.Decimal(1), *(height(x) for x in edges[1:])]
        return (
            np.array([int(x * unit) for x in at_once], "uint32"),
            np.array(widths, "float32"),
            np.array(heights, "float32"),
            np.float32(rim),
            np.float32(1 / rim),
        )


def standard_normal(key, shape):
    """Unit normal numbers, bit for bit those of `np.random.default_rng(key).standard_normal(shape, dtype="float32")`.

    Args:
        key: int32 (B, 1 … 4), one key per item; negative numbers stand for their bits, modulo 2 ** 32.
        shape: int32 vector or list, the shape of one item.

    Returns:
        float32 (B, *shape).
    """
    count = tf.reduce_prod(shape)
    key = tf.cast(key, tf.uint32)
    words = _words(*_state(key), count + count // 32 + 64)  # draws that take more than a word: 1.4 % of them
    at_once, widths, heights, rim, inverse_rim = (tf.constant(x) for x in _ziggurat())
    level = tf.cast(words & tf.constant(255, tf.uint32), tf.int32)
    size = tf.bitwise.right_shift(words, tf.constant(9, tf.uint32)) & tf.constant(2**23 - 1, tf.uint32)
    x = tf.cast(size, tf.float32) * tf.gather(widths, level)
    negative = (tf.bitwise.right_shift(words, tf.constant(8, tf.uint32)) & tf.constant(1, tf.uint32)) > 0
    x = tf.where(negative, -x, x)
    uniform = tf.cast(tf.bitwise.right_shift(words, tf.constant(8, tf.uint32)), tf.float32) * np.float32(2**-24)

    def ahead(values, places):
        return tf.concat([values[:, places:], tf.zeros_like(values[:, :places])], axis=1)

    accepted = size < tf.gather(at_once, level)
    lower = tf.gather(heights, level)
    rise = tf.gather(heights, tf.maximum(level - 1, 0)) - lower
    under = tf.cast(rise * ahead(uniform, 1) + lower, tf.float64) < tf.exp(-0.5 * tf.cast(x, tf.float64) ** 2)
    taken = tf.where(accepted, 1, 2)
    accepted = accepted | (under & (level > 0))
    # the tail: pairs of uniform numbers until one lies under the curve
    in_tail = (level == 0) & ~accepted
    logarithm = tf.math.log1p(-uniform)
    settled = tf.zeros_like(in_tail)
    for trial in range(TAIL_TRIALS):
        far, rise = -inverse_rim * ahead(logarithm, 1 + 2 * trial), -ahead(logarithm, 2 + 2 * trial)
        good = in_tail & ~settled & (rise + rise > far * far)
        left = (tf.bitwise.right_shift(size, tf.constant(8, tf.uint32)) & tf.constant(1, tf.uint32)) > 0
        x = tf.where(good, tf.where(left, -(rim + far), rim + far), x)
        taken = tf.where(good, 3 + 2 * trial, taken)
        settled = settled | good
    accepted = accepted | settled
    # Links from the word where a draw begins to that of the next draw; a rejected word passes its turn on.
    last = tf.shape(words)[1] - 1
    following = tf.minimum(tf.range(last + 1) + taken, last)
    begin = tf.where(accepted, tf.range(last + 1)[None], following)
    for _ in range(4):  # up to 16 rejections in a row
        begin = tf.gather(begin, begin, batch_dims=1)
    link = tf.gather(begin, following, batch_dims=1)
    # draw i begins i links after draw 0: follow the bits of i, by links of 1, 2, 4 …
    index = tf.range(count)[None]
    place = tf.repeat(begin[:, :1], count, axis=1)

    def follow(power, link, place):
        place = tf.where(index // power % 2 == 1, tf.gather(link, place, batch_dims=1), place)
        return 2 * power, tf.gather(link, link, batch_dims=1), place

    _, _, place = tf.while_loop(lambda power, link, place: power <= count, follow, (1, link, place))
    return tf.reshape(tf.gather(x, place, batch_dims=1), tf.concat([[-1], shape], axis=0))
