//! `WORK`: a workload whose every byte follows from its seed, in memory and on disk, however it
//! is interrupted, saved and restored; and the digests over memories and disks.

use alloc::vec;
use alloc::vec::Vec;

use crate::digest::Digest;
use crate::mem::{Arena, PAGE};
use crate::sequence::Sequence;
use crate::virtio::blk::{Blk, MAX_DATA, Op, SECTOR, Ticket};

/// Steps done before other work has its turn.
const SLICE: u64 = 64;

/// A run of the workload.
pub struct Work {
    sequence: Sequence,
    arena: Arena,
    pages: u64,
    /// Steps done.
    pub step: u64,
    /// Steps to do.
    pub steps: u64,
    /// A disk request failed; the run has stopped.
    pub failed: bool,
    on_disk: Option<(Op, Ticket)>,
    buffer: Vec<u8>,
    first_sector: u64,
    sectors: u64,
}

impl Work {
    /// A run over the arena's first `pages` pages, which are cleared first, and the second half
    /// of the disk's sectors.
    pub fn new(seed: u64, steps: u64, arena: Arena, pages: u64, disk: Option<&Blk>) -> Self {
        for page in 0..pages {
            if let Some((at, _)) = arena.run(page) {
                // SAFETY: an arena page.
                unsafe { at.write_bytes(0, PAGE as usize) };
            }
        }
        let sectors = disk.filter(|d| !d.read_only).map_or(0, |d| d.sectors);
        Self {
            sequence: Sequence::new(seed),
            arena,
            pages,
            step: 0,
            steps,
            failed: false,
            on_disk: None,
            buffer: vec![0; SECTOR],
            first_sector: sectors / 2,
            sectors: (sectors - sectors / 2).min(1 << 16),
        }
    }

    /// Whether steps are left and none waits for the disk.
    pub fn busy(&self) -> bool {
        !self.finished() && self.on_disk.is_none()
    }

    /// Whether it has ended.
    pub fn finished(&self) -> bool {
        self.failed || self.step == self.steps && self.on_disk.is_none()
    }

    /// Does a slice.
    pub fn poll(&mut self, disk: Option<&mut Blk>) {
        let mut disk = disk;
        for _ in 0..SLICE {
            if let Some((op, ticket)) = self.on_disk.take() {
                let Some(disk) = disk.as_deref_mut() else {
                    return;
                };
                let mut ticket = Some(ticket);
                match disk.take(&mut ticket) {
                    Some(true) if op == Op::Read => {
                        for word in self.buffer.as_chunks::<8>().0 {
                            self.sequence.absorb(u64::from_le_bytes(*word));
                        }
                    }
                    Some(good) => self.failed |= !good,
                    None => self.on_disk = ticket.map(|t| (op, t)),
                }
                if self.on_disk.is_some() {
                    return;
                }
            }
            if self.finished() {
                return;
            }
            if !self.step(disk.as_deref_mut()) {
                return;
            }
        }
    }

    /// One step: 64 bytes of memory; every 16th a sector written, every 64th a flush, every
    /// 128th a sector read, whose content goes into what follows. False if the disk is busy.
    fn step(&mut self, disk: Option<&mut Blk>) -> bool {
        let n = self.step + 1;
        let op = match n {
            n if n.is_multiple_of(128) => Some(Op::Read),
            n if n.is_multiple_of(64) => Some(Op::Flush),
            n if n.is_multiple_of(16) => Some(Op::Write),
            _ => None,
        };
        if let (Some(op), Some(disk), 1..) = (op, disk, self.sectors) {
            let mut after = self.sequence.clone();
            let sector = self.first_sector + after.next_number() % self.sectors;
            if op == Op::Write {
                for word in self.buffer.as_chunks_mut::<8>().0 {
                    *word = after.next_number().to_le_bytes();
                }
            }
            // SAFETY: the buffer is this run's own and is left alone until the ticket is taken.
            match unsafe { disk.submit(op, sector, &raw mut self.buffer[..]) } {
                Some(ticket) => self.on_disk = Some((op, ticket)),
                None => return false,
            }
            self.sequence = after;
        }
        if self.pages > 0
            && let Some((at, _)) = self.arena.run(self.sequence.next_number() % self.pages)
        {
            let line = (self.sequence.next_number() % (PAGE / 64)) as usize * 8;
            for i in 0..8 {
                // SAFETY: line + i < PAGE / 8, in an arena page.
                unsafe {
                    let word = at.cast::<u64>().add(line + i);
                    let old = word.read_volatile();
                    word.write_volatile(old.rotate_left(9) ^ self.sequence.next_number());
                }
            }
        }
        self.step = n;
        true
    }
}

/// A digest under way, over arena pages or a whole disk.
pub struct DigestJob {
    digest: Digest,
    over: Over,
}

enum Over {
    Arena {
        arena: Arena,
        page: u64,
        end: u64,
    },
    Disk {
        disk: usize,
        sector: u64,
        ticket: Option<Ticket>,
        asked: usize,
        buffer: Vec<u8>,
    },
}

impl DigestJob {
    /// Over arena pages `page..end`.
    pub fn arena(arena: Arena, page: u64, end: u64) -> Self {
        Self {
            digest: Digest::default(),
            over: Over::Arena { arena, page, end },
        }
    }

    /// Over disk number `disk`.
    pub fn disk(disk: usize) -> Self {
        let over = Over::Disk {
            disk,
            sector: 0,
            ticket: None,
            asked: 0,
            buffer: vec![0; MAX_DATA],
        };
        Self {
            digest: Digest::default(),
            over,
        }
    }

    /// Whether it could go on without anything happening first.
    pub fn busy(&self) -> bool {
        match &self.over {
            Over::Arena { .. } => true,
            Over::Disk { ticket, .. } => ticket.is_none(),
        }
    }

    /// Goes on for a while; gives the digest at the end, or an error's text.
    pub fn poll(&mut self, disks: &mut [Blk]) -> Option<Result<u64, &'static str>> {
        match &mut self.over {
            Over::Arena { arena, page, end } => {
                let stop = (*page + 256).min(*end);
                while *page < stop {
                    let Some((at, run)) = arena.run(*page) else {
                        break;
                    };
                    let n = run.min(stop - *page);
                    // SAFETY: n pages of the arena, which generators on other CPUs may be
                    // writing: what is read then is some mixture, but always plain bytes.
                    let bytes = unsafe { core::slice::from_raw_parts(at, (n * PAGE) as usize) };
                    self.digest.update(bytes);
                    *page += n;
                }
                (*page >= *end).then(|| Ok(self.digest.value()))
            }
            Over::Disk {
                disk,
                sector,
                ticket,
                asked,
                buffer,
            } => {
                let Some(disk) = disks.get_mut(*disk) else {
                    return Some(Err("no such disk"));
                };
                if ticket.is_some() {
                    match disk.take(ticket) {
                        None => return None,
                        Some(false) => return Some(Err("the disk cannot be read")),
                        Some(true) => {
                            self.digest.update(&buffer[..*asked]);
                            *sector += (*asked / SECTOR) as u64;
                        }
                    }
                }
                let left = disk.sectors - *sector;
                if left == 0 {
                    return Some(Ok(self.digest.value()));
                }
                *asked = (left.min((MAX_DATA / SECTOR) as u64)) as usize * SECTOR;
                // SAFETY: the job's own buffer, left alone until the ticket is taken.
                *ticket = unsafe { disk.submit(Op::Read, *sector, &raw mut buffer[..*asked]) };
                None
            }
        }
    }
}
