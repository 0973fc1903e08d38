//! One epoch being received: preallocated, with a temporary file for what does not fit.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use ax_wire::EpochId;
use ax_wire::stream::{EpochBegin, MAX_PAYLOAD};
use io_barrier::RxCounts;

use super::ShadowConfig;
use crate::arena::Arena;

/// The pages of an epoch that do not fit its stage: length-prefixed payloads in an unlinked file.
#[derive(Debug)]
struct Spill {
    file: File,
    payloads: usize,
}

/// Everything of one epoch.
#[derive(Debug)]
pub(super) struct Stage {
    pub epoch: EpochId,
    pub begin: Option<EpochBegin>,
    pub state: Vec<u8>,
    /// Checked page runs.
    pub runs: Arena,
    spill: Option<Spill>,
    pub disk: Vec<u8>,
    pub outputs: Vec<u8>,
    pub frames: u64,
    pub bytes: u64,
    pub pages: u64,
    pub digest: Option<u64>,
    pub rx_given: RxCounts,
    pub arrived_ns: u64,
    /// The first epoch after an initial copy: acknowledged once applied.
    pub first: bool,
}

impl Stage {
    pub fn new(config: &ShadowConfig) -> Stage {
        Stage {
            epoch: EpochId(0),
            begin: None,
            state: Vec::with_capacity(config.state_bytes),
            runs: Arena::new(config.stage_bytes),
            spill: None,
            disk: Vec::new(),
            outputs: Vec::new(),
            frames: 0,
            bytes: 0,
            pages: 0,
            digest: None,
            rx_given: RxCounts::default(),
            arrived_ns: 0,
            first: false,
        }
    }

    /// Discards what was received.
    pub fn clear(&mut self) {
        self.begin = None;
        self.state.clear();
        self.runs.clear();
        self.spill = None;
        self.disk.clear();
        self.outputs.clear();
        (self.frames, self.bytes, self.pages) = (0, 0, 0);
        self.digest = None;
        self.first = false;
    }

    /// Puts page runs that do not fit `runs` into a file in `dir`.
    pub fn spill(&mut self, dir: &Path, payload: &[u8]) -> io::Result<()> {
        let spill = match &mut self.spill {
            Some(spill) => spill,
            none => none.insert(Spill {
                file: tempfile::tempfile_in(dir)?,
                payloads: 0,
            }),
        };
        spill
            .file
            .write_all(&(payload.len() as u64).to_le_bytes())?;
        spill.file.write_all(payload)?;
        spill.payloads += 1;
        Ok(())
    }

    /// Reads what was spilled back, one payload after the other.
    pub fn unspill(
        &mut self,
        mut each: impl FnMut(&[u8]) -> Result<(), crate::guest::GuestError>,
    ) -> Result<(), crate::guest::GuestError> {
        let Some(mut spill) = self.spill.take() else {
            return Ok(());
        };
        let failed = |source: io::Error| crate::guest::GuestError {
            doing: "reading back the part of an epoch that did not fit its stage",
            source: Box::new(source),
        };
        spill.file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let mut payload = Vec::new();
        for _ in 0..spill.payloads {
            let mut len = [0; 8];
            spill.file.read_exact(&mut len).map_err(failed)?;
            payload.resize((u64::from_le_bytes(len) as usize).min(MAX_PAYLOAD), 0);
            spill.file.read_exact(&mut payload).map_err(failed)?;
            each(&payload)?;
        }
        Ok(())
    }
}
