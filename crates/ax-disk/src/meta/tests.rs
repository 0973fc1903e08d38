//! Crashes at every sector, other formats, other images.

use super::*;
use crate::map::Span;

const PAIR: PairId = PairId([3; 16]);
const SIZE: u64 = 100 * REGION;
const IMAGE: Identity = Identity {
    inode: 7,
    made: 8,
    changed: 9,
};

struct Facts {
    meta: Meta,
    marks: Mutex<Marks>,
}

impl Facts {
    fn of(path: &Path, image: Identity) -> Result<Facts, MetaError> {
        let (meta, marks) = Meta::on(
            Meta::file(path)?,
            path,
            PAIR,
            SIZE,
            Condition::Consistent,
            image,
        )?;
        let marks = Mutex::new(marks);
        Ok(Facts { meta, marks })
    }

    fn write(&mut self, offset: u64, len: u64) {
        let run = Span { offset, len }.run();
        if !self.marks.lock().touch(&run) {
            self.meta.cover(&self.marks, &run).unwrap();
        }
    }

    fn rotate(&mut self, basis: Basis) {
        let rotation = self.marks.lock().begin_rotation();
        let ended = self.meta.end_rotation(&self.marks, rotation, basis);
        assert!(ended.unwrap().is_some());
    }

    fn dirty(&self) -> u64 {
        self.marks.lock().dirty().len()
    }
}

fn reopen(path: &Path) -> Result<Facts, MetaError> {
    Facts::of(path, IMAGE)
}

/// The map is durable before the first header: power may be lost between the two.
#[test]
fn a_file_that_never_had_a_header_is_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk0.meta");
    let mut facts = reopen(&path).unwrap();
    facts.write(0, 1);
    facts.meta.file.write_at(&[0; 2 * PAGE], 0).unwrap();
    drop(facts);
    let facts = reopen(&path).unwrap();
    assert_eq!((facts.dirty(), facts.meta.basis()), (0, Basis::NONE));
    drop(facts);
    // One that has one is not: it is damaged when that can't be read.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_at(&[1; 2 * PAGE], 0).unwrap();
    assert!(matches!(reopen(&path), Err(MetaError::Damaged { .. })));
}

#[test]
fn facts_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk0.meta");
    let mut facts = reopen(&path).unwrap();
    assert_eq!((facts.dirty(), facts.meta.basis()), (0, Basis::NONE));
    facts.rotate(Basis([5; 16]));
    facts.write(3 * REGION + 5, 2 * REGION);
    facts.meta.mark_inconsistent().unwrap();
    facts.meta.set_generation(Generation(9)).unwrap();
    drop(facts);
    let facts = reopen(&path).unwrap();
    assert_eq!(facts.meta.condition(), Condition::Inconsistent);
    assert_eq!(facts.meta.generation(), Generation(9));
    assert_eq!(facts.meta.basis(), Basis([5; 16]));
    assert_eq!(facts.marks.lock().dirty().take_run(0, 9), Some(3..6));
    assert_eq!(facts.dirty(), 3);
}

#[test]
fn a_torn_header_leaves_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk0.meta");
    let mut facts = reopen(&path).unwrap();
    facts.meta.set_generation(Generation(4)).unwrap();
    facts.meta.set_generation(Generation(5)).unwrap();
    let slot = (facts.meta.header.sequence % 2) * PAGE as u64;
    facts.meta.file.write_at(&[0xee; 20], slot + 8).unwrap();
    drop(facts);
    assert_eq!(reopen(&path).unwrap().meta.generation(), Generation(4));
}

#[test]
fn a_torn_map_means_everything_is_dirty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk0.meta");
    let facts = reopen(&path).unwrap();
    let file = &facts.meta.file;
    file.write_at(&[1; 7], MAP_START + 100).unwrap();
    drop(facts);
    assert_eq!(reopen(&path).unwrap().dirty(), SIZE / REGION);
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(MAP_START + 50)
        .unwrap();
    assert_eq!(reopen(&path).unwrap().dirty(), SIZE / REGION);
}

/// Every state a crash can leave of the writes that drop bits, each of them whole, torn or absent, in
/// any order between two syncs: never a map that is clean relative to the wrong moment.
#[test]
fn a_crash_while_bits_are_dropped_leaves_the_former_map_or_the_new_one_or_everything() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk0.meta");
    let (old, new) = (Basis([1; 16]), Basis([2; 16]));
    let mut facts = reopen(&path).unwrap();
    facts.rotate(old);
    facts.write(0, 3 * REGION);
    let before = std::fs::read(&path).unwrap();
    let rotation = facts.marks.lock().begin_rotation();
    facts.write(2 * REGION, 1);
    let ended = facts.meta.end_rotation(&facts.marks, rotation, new);
    assert!(ended.unwrap().is_some());
    drop(facts);
    let after = std::fs::read(&path).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    let written: Vec<usize> = (0..after.len() / 512)
        .filter(|s| before[s * 512..][..512] != after[s * 512..][..512])
        .collect();
    assert!(written.len() >= 2, "a page and a header");
    // A superset of what can be left: any sector of either write, or half of it, may be there or not.
    for there in 0..3u32.pow(written.len() as u32) {
        let mut bytes = before.clone();
        for (n, sector) in written.iter().enumerate() {
            let len = [0, 200, 512][(there / 3u32.pow(n as u32) % 3) as usize];
            bytes[sector * 512..][..len].copy_from_slice(&after[sector * 512..][..len]);
        }
        std::fs::write(&path, &bytes).unwrap();
        let facts = reopen(&path).unwrap();
        let got = (facts.meta.basis() == new, facts.dirty());
        let everything = SIZE / REGION;
        let right = [
            (false, 3),
            (false, everything),
            (true, 1),
            (true, everything),
        ];
        assert!(right.contains(&got), "{there}: {got:?}");
        seen.insert(got);
    }
    assert!(
        seen.contains(&(false, 3)) && seen.contains(&(true, 1)),
        "{seen:?}"
    );
    assert!(seen.contains(&(false, SIZE / REGION)), "{seen:?}");
}

#[test]
fn the_map_of_another_or_a_changed_image_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk0.meta");
    let everything = (SIZE / REGION, Basis::NONE);
    let said = |image| {
        let facts = Facts::of(&path, image).unwrap();
        (facts.dirty(), facts.meta.basis())
    };
    let mut facts = reopen(&path).unwrap();
    facts.rotate(Basis([5; 16]));
    facts.meta.close(IMAGE.changed).unwrap();
    drop(facts);
    let later = Identity {
        changed: 10,
        ..IMAGE
    };
    let kept = std::fs::read(&path).unwrap();
    assert_eq!(said(IMAGE), (0, Basis([5; 16])), "as it was closed");
    // After a crash nobody knows when it was last changed.
    assert_eq!(said(later), (0, Basis([5; 16])));
    std::fs::write(&path, &kept).unwrap();
    assert_eq!(said(later), everything, "changed while it was closed");
    std::fs::write(&path, &kept).unwrap();
    assert_eq!(said(Identity { inode: 70, ..IMAGE }), everything);
    std::fs::write(&path, &kept).unwrap();
    assert_eq!(said(Identity { made: 80, ..IMAGE }), everything);
    assert_eq!(
        said(Identity { made: 80, ..IMAGE }),
        everything,
        "and stays so"
    );
}

#[test]
fn a_file_of_the_format_before_keeps_its_facts_and_says_everything_is_dirty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk0.meta");
    let mut bytes = vec![0; 3 * PAGE];
    for sequence in [4, 5u64] {
        let mut header = Header1 {
            magic: MAGIC_1,
            pair: PAIR.0,
            sequence,
            size: SIZE,
            generation: 10 + sequence,
            inconsistent: 1,
            crc: 0,
        };
        header.crc = sum(header.as_bytes());
        let at = (sequence % 2) as usize * PAGE;
        bytes[at..][..size_of::<Header1>()].copy_from_slice(header.as_bytes());
    }
    std::fs::write(&path, &bytes).unwrap();
    for _ in 0..2 {
        let facts = reopen(&path).unwrap();
        let (condition, basis) = (facts.meta.condition(), facts.meta.basis());
        assert_eq!((condition, basis), (Condition::Inconsistent, Basis::NONE));
        assert_eq!(facts.meta.generation(), Generation(15));
        assert_eq!(facts.dirty(), SIZE / REGION);
    }
    let left = std::fs::read(&path).unwrap();
    assert!(
        !left.windows(8).any(|w| w == MAGIC_1),
        "no build takes an old slot for the latest"
    );
}

#[test]
fn another_disks_facts_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk0.meta");
    drop(reopen(&path).unwrap());
    let other = Meta::on(
        Meta::file(&path).unwrap(),
        &path,
        PAIR,
        SIZE + REGION,
        Condition::Consistent,
        IMAGE,
    );
    assert!(matches!(other, Err(MetaError::Foreign { .. })));
    std::fs::write(&path, [1; 9000]).unwrap();
    assert!(matches!(reopen(&path), Err(MetaError::Damaged { .. })));
}
