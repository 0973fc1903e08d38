//! What a side says of its blocks, so that only those that differ travel ([`ax_wire::resync`]).

use std::io;
use std::sync::Arc;

use ax_wire::resync::{
    ANSWER_REGIONS, ASK_REGIONS, Ask, BLOCK, DiskAsk, DiskBasis, DiskMap, DiskSums, MAP_REGIONS,
    REGION, REGION_BLOCKS, SUM, push_blocks, push_zeros,
};
use zerocopy::IntoBytes;

use crate::image::Image;
use crate::map::Regions;

/// The hash of a block: BLAKE3 keyed for this session, its first half.
pub(crate) fn block_sum(key: &[u8; 32], block: &[u8]) -> [u8; SUM] {
    let hash = blake3::keyed_hash(key, block);
    let mut sum = [0; SUM];
    sum.copy_from_slice(hash.as_bytes().get(..SUM).unwrap_or(&[0; SUM]));
    sum
}

/// True when every byte is zero.
pub(crate) fn is_blank(bytes: &[u8]) -> bool {
    static ZEROS: [u8; BLOCK] = [0; BLOCK];
    bytes
        .chunks(BLOCK)
        .all(|block| ZEROS.get(..block.len()) == Some(block))
}

/// Answers a question of the primary: `out` is replaced by the payload. False, with nothing in it, when
/// it is about what these disks do not have.
///
/// # Errors
/// An image could not be read.
pub fn answer(disks: &[Arc<Image>], ask: &Ask, out: &mut Vec<u8>) -> io::Result<bool> {
    out.clear();
    let unit = match ask {
        Ask::Basis(basis) => basis.unit.get(),
        Ask::Sums(ask) => ask.unit.get(),
    };
    let Some(disk) = usize::try_from(unit).ok().and_then(|unit| disks.get(unit)) else {
        return Ok(false);
    };
    match ask {
        Ask::Basis(basis) => Ok(tell_map(disk, basis, out)),
        Ask::Sums(ask) => tell_sums(disk, ask, out),
    }
}

fn tell_map(disk: &Image, ask: &DiskBasis, out: &mut Vec<u8>) -> bool {
    let (basis, dirty) = disk.differing();
    let from = ask.from.get();
    if ask.size.get() != disk.size() || from >= dirty.count() {
        return false;
    }
    let everything = !basis.matches(crate::meta::Basis(ask.basis));
    let left = dirty.count() - from;
    let count = if everything {
        left
    } else {
        left.min(MAP_REGIONS)
    };
    let head = DiskMap {
        unit: ask.unit,
        from: ask.from,
        count: count.into(),
        everything: u64::from(everything).into(),
    };
    out.extend_from_slice(head.as_bytes());
    if !everything {
        out.extend(dirty.bits(from, count));
    }
    true
}

fn tell_sums(disk: &Image, ask: &DiskAsk, out: &mut Vec<u8>) -> io::Result<bool> {
    let (first, count) = (ask.first.get(), ask.count.get());
    let end = first.saturating_add(count);
    if count == 0 || count > ASK_REGIONS || end > Regions::of_size(disk.size()) {
        return Ok(false);
    }
    let head = DiskSums {
        unit: ask.unit,
        first: ask.first,
    };
    out.extend_from_slice(head.as_bytes());
    let mut content = vec![0; REGION as usize];
    let mut sums = Vec::with_capacity(REGION_BLOCKS);
    let (mut at, mut zeros, mut told) = (first, 0u32, 0);
    while at < end && told < ANSWER_REGIONS {
        // Holes are not read.
        let data = disk.next_data(at * REGION)?;
        let next = data.map_or(end, |data| (data.start / REGION).clamp(at, end));
        zeros += (next - at) as u32;
        at = next;
        if at == end {
            break;
        }
        let len = REGION.min(disk.size() - at * REGION) as usize;
        let content = content.get_mut(..len).unwrap_or_default();
        disk.read(at * REGION, content)?;
        let mut present = [0u8; REGION_BLOCKS / 8];
        sums.clear();
        for (n, block) in content.chunks(BLOCK).enumerate() {
            if let Some(byte) = present.get_mut(n / 8).filter(|_| !is_blank(block)) {
                *byte |= 1 << (n % 8);
                sums.push(block_sum(&ask.key, block));
            }
        }
        if sums.is_empty() {
            zeros += 1;
        } else {
            if zeros > 0 {
                push_zeros(out, std::mem::take(&mut zeros));
            }
            push_blocks(out, &present, &sums);
            told += 1;
        }
        at += 1;
    }
    if zeros > 0 {
        push_zeros(out, zeros);
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::tests::{SIZE, fresh};
    use ax_wire::resync::{Entry, MAX_ANSWER, sums};

    fn ask(unit: u64, first: u64, count: u64) -> Ask {
        Ask::Sums(DiskAsk {
            unit: unit.into(),
            first: first.into(),
            count: count.into(),
            key: [7; 32],
        })
    }

    fn basis(unit: u64, size: u64, from: u64) -> Ask {
        Ask::Basis(DiskBasis {
            unit: unit.into(),
            size: size.into(),
            from: from.into(),
            basis: [0; 16],
        })
    }

    #[test]
    fn zeros_cost_a_few_bytes_and_blocks_a_hash_each() {
        let dir = tempfile::tempdir().unwrap();
        let image = fresh(dir.path(), "a");
        image.write(REGION + 8192, &[1; 4096]).unwrap();
        image.write(2 * REGION, &vec![0; REGION as usize]).unwrap();
        let mut out = vec![];
        let disks = [Arc::new(image)];
        assert!(answer(&disks, &ask(0, 0, SIZE / REGION), &mut out).unwrap());
        let (head, entries) = sums(&out).unwrap();
        assert_eq!((head.unit.get(), head.first.get()), (0, 0));
        let entries: Vec<_> = entries.collect::<Result<_, _>>().unwrap();
        let [
            Entry::Zeros(1),
            Entry::Blocks { present, sums },
            Entry::Zeros(2),
        ] = entries[..]
        else {
            unreachable!("{entries:?}");
        };
        assert_eq!(
            (present[0], sums),
            (0b100, &[block_sum(&[7; 32], &[1; 4096])][..])
        );
        assert_ne!(
            sums[0],
            block_sum(&[8; 32], &[1; 4096]),
            "another session, another hash"
        );
    }

    #[test]
    fn an_answer_is_bounded_and_a_question_about_nothing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("big");
        let size = 40 * REGION + 512;
        std::fs::write(&path, vec![1; size as usize]).unwrap();
        let facts = dir.path().join("big.meta");
        let image = Image::open(&path, &facts, ax_wire::PairId([1; 16]), size, false).unwrap();
        let disks = [Arc::new(image)];
        let mut out = vec![];
        assert!(answer(&disks, &ask(0, 0, 41), &mut out).unwrap());
        assert_eq!(sums(&out).unwrap().1.count() as u64, ANSWER_REGIONS);
        assert!(out.len() <= MAX_ANSWER, "{}", out.len());
        assert!(answer(&disks, &ask(0, 40, 1), &mut out).unwrap());
        assert!(answer(&disks, &basis(0, size, 40), &mut out).unwrap());
        for refused in [
            ask(1, 0, 1),
            ask(u64::MAX, 0, 1),
            ask(0, 0, 0),
            ask(0, 0, 42),
            ask(0, 41, 1),
            ask(0, u64::MAX, 2),
            ask(0, 0, u64::MAX),
            basis(1, size, 0),
            basis(0, size + 1, 0),
            basis(0, size, 41),
            basis(0, size, u64::MAX),
        ] {
            assert!(!answer(&disks, &refused, &mut out).unwrap(), "{refused:?}");
            assert!(out.is_empty());
        }
    }
}
