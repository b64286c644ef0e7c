//! libFuzzer's mutations, and one of our own: a part of the input many times over. Parsers whose cost grows with the
//! square of some count are found by that; single-byte changes would never get there.

/// One input in so many is made by repetition.
const REPEATED: u32 = 24;

/// Changes the first `size` bytes of `data`, which has room for `max_size`; returns the new size.
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
    // Any spread of the seed's bits will do.
    let mut bits = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut below = |limit: usize| {
        bits = bits.rotate_left(23).wrapping_mul(0xd6e8_feb8_6659_fd93) ^ (bits >> 29);
        usize::try_from(bits >> 33).unwrap_or_default() % limit
    };
    let start = below(size);
    let longest = (size - start).min(if below(4) == 0 { size } else { 64 });
    let end = start + 1 + below(longest);
    // Mostly a few times, now and then as often as there is room for.
    let room = max_size.saturating_sub(size) / (end - start);
    let times = if below(4) == 0 { room } else { room.min(1 + below(100)) };
    let repeated = [&data[..start], &data[start..end].repeat(times + 1), &data[end..size]].concat();
    let new = repeated.len().min(max_size).min(data.len());
    data[..new].copy_from_slice(&repeated[..new]);
    new
}
