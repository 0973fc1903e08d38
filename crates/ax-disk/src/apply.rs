//! Applying disk records to the shadow's images.

use std::io;
use std::sync::Arc;

use ax_wire::EpochId;
use ax_wire::records::{FLUSH_AWAITED, Record, RecordError, RecordKind, Records};

use crate::image::Image;
use crate::map::Rotation;
use crate::meta::{Basis, MetaError};

/// Why records could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The peer sent something that is no disk record of this VM.
    #[error("disk records of the peer: {0}")]
    Record(#[from] RecordError),
    /// A disk that this VM does not have, or a kind that is none of disks.
    #[error("the peer sent a {kind:?} record for disk {unit}; this VM has {disks} disks")]
    NotADisk {
        /// Kind of the record.
        kind: RecordKind,
        /// Disk it names.
        unit: u8,
        /// Disks there are.
        disks: usize,
    },
    /// This host's image failed.
    #[error("disk image {path}: {source}", path = path.display())]
    Image {
        /// The image.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A mark of the dirty-region maps that is none.
    #[error("the peer sent a mark of the dirty-region maps of {0} bytes")]
    Mark(usize),
    /// The durable facts beside an image could not be written.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// The applying thread could not be started.
    #[error("start the thread that applies disk writes: {0}")]
    Thread(#[source] io::Error),
}

/// What a mark in an epoch has the settling thread do, once that epoch is applied.
pub(crate) enum Chore {
    /// Make the disks durable up to this epoch and say so: a rotation began in it.
    Settle(EpochId, Vec<Rotation>),
    /// Drop what is older than the rotation that began in this epoch.
    Drop(EpochId, Basis),
}

/// What applying records has come to.
#[derive(Default)]
pub(crate) struct Applied {
    /// They ended durable on every disk: the last record was a FLUSH of the only one, or one was awaited.
    pub durable: bool,
    /// The primary waits for a FLUSH among them.
    pub awaited: bool,
    /// For the settling thread.
    pub chores: Vec<Chore>,
}

/// What a mark of the maps means here.
fn chore(
    disks: &[Arc<Image>],
    epoch: EpochId,
    record: &Record<'_>,
) -> Result<Option<Chore>, ApplyError> {
    let wrong = || ApplyError::Mark(record.payload.len());
    match (record.at, record.payload) {
        (0, []) => {
            // Not only the disks that are written: each has its place.
            let rotations = disks.iter().map(|disk| disk.begin_rotation());
            Ok(Some(Chore::Settle(epoch, rotations.collect())))
        }
        (began, basis) => {
            let basis = Basis(basis.try_into().map_err(|_| wrong())?);
            Ok(Some(Chore::Drop(EpochId(began), basis)))
        }
    }
}

/// Applies the records of `epoch`, or of the initial copy when there is none, in order.
pub(crate) fn apply(
    disks: &[Arc<Image>],
    epoch: Option<EpochId>,
    records: &[u8],
) -> Result<Applied, ApplyError> {
    let mut applied = Applied::default();
    // A FLUSH says of its own disk only that it is durable.
    let only_disk = disks.iter().filter(|disk| !disk.read_only()).count() == 1;
    for record in Records::new(records) {
        let record = record?;
        if let (RecordKind::DiskMark, Some(epoch)) = (record.kind, epoch) {
            applied.chores.extend(chore(disks, epoch, &record)?);
            continue;
        }
        let disk = disks.get(usize::from(record.unit));
        let unknown = ApplyError::NotADisk {
            kind: record.kind,
            unit: record.unit,
            disks: disks.len(),
        };
        let Some(disk) = disk else {
            return Err(unknown);
        };
        let failed = |source| ApplyError::Image {
            path: disk.path().to_path_buf(),
            source,
        };
        match record.kind {
            RecordKind::DiskWrite => disk.write(record.at, record.payload).map_err(failed)?,
            RecordKind::DiskZero => match <[u8; 8]>::try_from(record.payload) {
                Ok(len) => disk
                    .write_zeros(record.at, u64::from_le_bytes(len))
                    .map_err(failed)?,
                Err(_) => return Err(unknown),
            },
            RecordKind::DiskFlush => disk.flush().map_err(failed)?,
            _ => return Err(unknown),
        }
        let flushed = record.kind == RecordKind::DiskFlush;
        applied.durable = flushed && only_disk;
        applied.awaited |= flushed && record.at == FLUSH_AWAITED;
    }
    if applied.awaited {
        // Durable is told by epoch: other disks' writes and what came after the FLUSH are in it too.
        each(disks, Image::flush)?;
        applied.durable = true;
    }
    Ok(applied)
}

/// Does something with every image that may be written.
pub(crate) fn each(
    disks: &[Arc<Image>],
    act: impl Fn(&Image) -> io::Result<()>,
) -> Result<(), ApplyError> {
    disks
        .iter()
        .filter(|d| !d.read_only())
        .try_for_each(|disk| {
            act(disk).map_err(|source| ApplyError::Image {
                path: disk.path().to_path_buf(),
                source,
            })
        })
}
