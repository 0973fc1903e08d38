//! A witness's durable memory: one record per pair, in redb.
//!
//! A change is durable before it is answered. The store's incarnation is made with the store, so
//! that a wiped one is known for what it is (rule 27). A store must never be put back from an
//! older copy: it would grant generations anew. Wipe it instead and let both hosts register.

use std::path::{Path, PathBuf};

use ax_wire::record::{Record, WitnessId};
use ax_wire::{PairId, Side};
use bincode::{Decode, Encode};
use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};

/// Most pairs one witness knows.
pub const MAX_PAIRS: u64 = 1 << 16;

const META: TableDefinition<&str, [u8; 16]> = TableDefinition::new("meta");
const PAIRS: TableDefinition<[u8; 16], &[u8]> = TableDefinition::new("pairs");
const INCARNATION: &str = "store";
/// First byte of a stored entry.
const LAYOUT: u8 = 1;
/// Longest stored entry, bytes.
const MAX_ENTRY: usize = 1024;
/// Longest host name kept, bytes.
const MAX_NAME: usize = 256;

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The data folder or the identity's file.
    #[error("witness data {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The identity's file is not one.
    #[error(
        "{0} is not a witness identity (32 hexadecimal digits); to make this a new witness remove \
         the whole data folder, then both hosts of every pair must register again"
    )]
    Identity(PathBuf),
    /// Another process has the store open.
    #[error("{0} is in use by another witness process")]
    InUse(PathBuf),
    /// An entry is not what was written.
    #[error(
        "the record of pair {0} is damaged; remove records.redb: both hosts of every pair then \
         register again"
    )]
    Damaged(PairId),
    /// The database.
    #[error("witness records: {0}")]
    Database(Box<redb::Error>),
}

macro_rules! from_redb {
    ($($error:ident)*) => {$(
        impl From<redb::$error> for StoreError {
            fn from(error: redb::$error) -> Self {
                StoreError::Database(Box::new(error.into()))
            }
        }
    )*};
}
from_redb!(DatabaseError TransactionError TableError StorageError CommitError);

/// What is kept of a pair.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Entry {
    /// Its record.
    pub record: Record,
    /// The authenticated names of the hosts of sides A and B; none where the link is plain.
    hosts: [Option<String>; 2],
}

impl Entry {
    /// A newly registered pair; the hosts' names become known as they speak.
    pub fn new(record: Record) -> Entry {
        Entry {
            record,
            hosts: [None, None],
        }
    }

    /// True when `host` may speak for `side`: the first to do so is remembered.
    #[must_use]
    pub fn admit(&mut self, side: Side, host: Option<&str>) -> bool {
        let known = &mut self.hosts[side as usize];
        match (known.as_deref(), host) {
            (Some(known), Some(host)) => known == host,
            (Some(_), None) => false,
            (None, Some(host)) if host.len() <= MAX_NAME => {
                *known = Some(host.to_owned());
                true
            }
            (None, Some(_)) => false,
            (None, None) => true,
        }
    }

    /// That side's host was replaced: the next that may speak for it is remembered.
    pub fn forget_host(&mut self, side: Side) {
        self.hosts[side as usize] = None;
    }

    fn encode(&self) -> Result<Vec<u8>, bincode::error::EncodeError> {
        let mut bytes = vec![LAYOUT];
        bincode::encode_into_std_write(self, &mut bytes, config())?;
        Ok(bytes)
    }

    fn decode(pair: PairId, bytes: &[u8]) -> Result<Entry, StoreError> {
        match bytes.split_first() {
            Some((&LAYOUT, rest)) => match bincode::decode_from_slice(rest, config()) {
                Ok((entry, used)) if used == rest.len() => Ok(entry),
                _ => Err(StoreError::Damaged(pair)),
            },
            _ => Err(StoreError::Damaged(pair)),
        }
    }
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MAX_ENTRY>()
}

/// The open store. Only one process can have it open.
#[derive(Debug)]
pub struct Store {
    db: Database,
    id: WitnessId,
}

/// One transaction: nothing of it is kept unless it commits.
pub struct Batch<'t> {
    table: redb::Table<'t, [u8; 16], &'static [u8]>,
    changed: bool,
}

impl Store {
    /// Opens the store in `dir`, or makes it.
    ///
    /// # Errors
    /// The folder or the database cannot be used, or an entry is damaged.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io { path, source }
        };
        std::fs::create_dir_all(dir).map_err(io(dir))?;
        let identity = identity(&dir.join("witness.id"))?;
        let path = dir.join("records.redb");
        let db = Database::create(&path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => StoreError::InUse(path.clone()),
            other => other.into(),
        })?;
        let store = Store::begin(db, identity, &path)?;
        // The names of new files must survive a power cut before anything is promised.
        std::fs::File::open(dir)
            .and_then(|d| d.sync_all())
            .map_err(io(dir))?;
        store.check()?;
        Ok(store)
    }

    /// Opens the store on another medium than a file, or makes it there. For tests of what a medium does
    /// when its power is cut.
    ///
    /// # Errors
    /// The database cannot be used, or an entry is damaged.
    pub fn open_on(
        medium: impl redb::StorageBackend,
        identity: [u8; 16],
    ) -> Result<Store, StoreError> {
        let db = redb::Builder::new().create_with_backend(medium)?;
        let store = Store::begin(db, identity, Path::new("a medium"))?;
        store.check()?;
        Ok(store)
    }

    fn begin(db: Database, identity: [u8; 16], path: &Path) -> Result<Store, StoreError> {
        let txn = db.begin_write()?;
        let store = {
            let mut meta = txn.open_table(META)?;
            txn.open_table(PAIRS)?;
            let known = meta.get(INCARNATION)?.map(|guard| guard.value());
            match known {
                Some(known) => known,
                None => {
                    let new = random(path)?;
                    meta.insert(INCARNATION, new)?;
                    new
                }
            }
        };
        txn.commit()?;
        Ok(Store {
            db,
            id: WitnessId { identity, store },
        })
    }

    /// Who this witness is, and which store this is.
    pub fn id(&self) -> WitnessId {
        self.id
    }

    fn check(&self) -> Result<(), StoreError> {
        let txn = self.db.begin_read()?;
        for item in txn.open_table(PAIRS)?.iter()? {
            let (pair, bytes) = item?;
            Entry::decode(PairId(pair.value()), bytes.value())?;
        }
        Ok(())
    }

    /// Runs `work` in one transaction, durable when this returns. Nothing that `work` learned may be
    /// told to anybody before.
    ///
    /// # Errors
    /// The store's; what was done is then in doubt and the store must be opened anew.
    pub fn batch<T>(
        &self,
        work: impl FnOnce(&mut Batch<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let txn = self.db.begin_write()?;
        let (done, changed) = {
            let mut batch = Batch {
                table: txn.open_table(PAIRS)?,
                changed: false,
            };
            let done = work(&mut batch)?;
            (done, batch.changed)
        };
        if changed {
            txn.commit()?;
        } else {
            txn.abort()?;
        }
        Ok(done)
    }
}

impl Batch<'_> {
    /// What is known of a pair.
    ///
    /// # Errors
    /// The store's.
    pub fn get(&self, pair: PairId) -> Result<Option<Entry>, StoreError> {
        match self.table.get(pair.0)? {
            Some(bytes) => Entry::decode(pair, bytes.value()).map(Some),
            None => Ok(None),
        }
    }

    /// Keeps an entry.
    ///
    /// # Errors
    /// The store's.
    pub fn put(&mut self, pair: PairId, entry: &Entry) -> Result<(), StoreError> {
        let bytes = entry.encode().map_err(|_| StoreError::Damaged(pair))?;
        self.table.insert(pair.0, bytes.as_slice())?;
        self.changed = true;
        Ok(())
    }

    /// Forgets a pair.
    ///
    /// # Errors
    /// The store's.
    pub fn remove(&mut self, pair: PairId) -> Result<(), StoreError> {
        self.changed |= self.table.remove(pair.0)?.is_some();
        Ok(())
    }

    /// True when no further pair may become known.
    ///
    /// # Errors
    /// The store's.
    pub fn is_full(&self) -> Result<bool, StoreError> {
        Ok(self.table.len()? >= MAX_PAIRS)
    }
}

/// The witness's identity, made and made durable if there is none.
fn identity(path: &Path) -> Result<[u8; 16], StoreError> {
    let io = |source| StoreError::Io {
        path: path.to_owned(),
        source,
    };
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let id: PairId = text
                .trim()
                .parse()
                .map_err(|_| StoreError::Identity(path.to_owned()))?;
            Ok(id.0)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let id = random(path)?;
            let new = path.with_extension("new");
            let write = || {
                use std::io::Write;
                let mut file = std::fs::File::create(&new)?;
                writeln!(file, "{}", PairId(id))?;
                file.sync_all()?;
                std::fs::rename(&new, path)
            };
            write().map_err(io)?;
            Ok(id)
        }
        Err(error) => Err(io(error)),
    }
}

/// 16 bytes of the kernel's randomness, for the file at `path`.
pub(crate) fn random(path: &Path) -> Result<[u8; 16], StoreError> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut bytes))
        .map_err(|source| StoreError::Io {
            path: path.to_owned(),
            source,
        })?;
    Ok(bytes)
}
