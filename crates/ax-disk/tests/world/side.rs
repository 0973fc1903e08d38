//! One side's image and what the model knows of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use ax_disk::Image;
use ax_wire::PairId;
use ax_wire::resync::REGION;

pub const SIZE: u64 = 6 * REGION + 5 * 512;
const SECTOR: usize = 512;

pub use ax_sync::sim::Rng;

pub struct Side {
    pub path: PathBuf,
    pub image: Option<Arc<Image>>,
    pub content: Vec<u8>,
    /// Sectors that are not durable, with what was there when they were.
    pub volatile: BTreeMap<usize, Vec<u8>>,
}

fn sectors() -> impl Iterator<Item = std::ops::Range<usize>> {
    let all = (0..SIZE as usize).step_by(SECTOR);
    all.map(|s| s..(s + SECTOR).min(SIZE as usize))
}

impl Side {
    /// A side with a fresh image of holes.
    pub fn new(path: PathBuf) -> Side {
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(SIZE).unwrap();
        let mut side = Side {
            path,
            image: None,
            content: vec![0; SIZE as usize],
            volatile: BTreeMap::new(),
        };
        side.open();
        side
    }

    pub fn image(&self) -> Arc<Image> {
        Arc::clone(self.image.as_ref().unwrap())
    }

    pub fn facts(&self) -> PathBuf {
        self.path.with_extension("meta")
    }

    pub fn open(&mut self) {
        let image = Image::open(&self.path, &self.facts(), PairId([1; 16]), SIZE, false);
        self.image = Some(Arc::new(image.unwrap()));
    }

    /// The image has been written: what the model makes of it.
    pub fn wrote(&mut self, at: u64, data: &[u8]) {
        let at = at as usize;
        for sector in (at..at + data.len()).step_by(SECTOR) {
            let before = &self.content[sector..(sector + SECTOR).min(SIZE as usize)];
            let before = before.to_vec();
            self.volatile.entry(sector).or_insert(before);
        }
        self.content[at..at + data.len()].copy_from_slice(data);
    }

    /// Everything in `then` is durable; what was written after it is not known to be.
    pub fn durable_as_of(&mut self, then: &[u8]) {
        let later = sectors().filter(|s| self.content[s.clone()] != then[s.clone()]);
        self.volatile = later.map(|s| (s.start, then[s].to_vec())).collect();
    }

    pub fn flushed(&mut self) {
        self.image().flush().unwrap();
        self.volatile.clear();
    }

    /// The process is gone, or with `power` the whole host; `facts` is how the file of facts was left.
    pub fn crash(&mut self, facts: Vec<u8>, power: bool, rng: &mut Rng) {
        let image = Arc::into_inner(self.image.take().unwrap());
        drop(image.unwrap());
        // It was not closed in order.
        std::fs::write(self.facts(), facts).unwrap();
        if power {
            let file = std::fs::File::options().write(true).open(&self.path);
            let file = file.unwrap();
            for (sector, before) in std::mem::take(&mut self.volatile) {
                if rng.one_in(2) {
                    use std::os::unix::fs::FileExt;
                    file.write_all_at(&before, sector as u64).unwrap();
                    self.content[sector..][..before.len()].copy_from_slice(&before);
                }
            }
        }
    }

    pub fn check(&self) {
        let there = std::fs::read(&self.path).unwrap();
        let differs = (0..there.len()).find(|n| there[*n] != self.content[*n]);
        assert_eq!(differs, None, "the model is wrong about {:?}", self.path);
    }
}
