//! libFuzzer's mutations, and an additional one that repeats a part of the input many times. It finds parsers whose cost
//! grows with the square of a count, which single-byte changes would not reach.

/// One input in this number is created by repetition.
const REPEATED: u32 = 24;

/// Mutates the first `size` bytes of `data`, which has room for `max_size`, and returns the new size.
pub fn mutate(
    data: &mut [u8],
    size: usize,
    max_size: usize,
    seed: u32,
    default: fn(&mut [u8], usize, usize) -> usize,
) -> usize {
    if size == 0 || !seed.is_multiple_of(REPEATED) {
        return default(data, size, max_size);
    }
    // Any distribution of the seed's bits is good enough.
    let mut bits = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut below = |limit: usize| {
        bits = bits.rotate_left(23).wrapping_mul(0xd6e8_feb8_6659_fd93) ^ (bits >> 29);
        usize::try_from(bits >> 33).unwrap_or_default() % limit
    };
    let start = below(size);
    let longest = (size - start).min(if below(4) == 0 { size } else { 64 });
    let end = start + 1 + below(longest);
    // Usually a few repetitions, sometimes as many as fit.
    let room = max_size.saturating_sub(size) / (end - start);
    let times = if below(4) == 0 { room } else { room.min(1 + below(100)) };
    let repeated = [&data[..start], &data[start..end].repeat(times + 1), &data[end..size]].concat();
    let new = repeated.len().min(max_size).min(data.len());
    data[..new].copy_from_slice(&repeated[..new]);
    new
}
