//! The certificates of the hosts and witnesses this one is paired with.
//!
//! One file per peer, `<data_dir>/trusted/<name>.pem`; to stop trusting a peer, remove its file.
//! The directory is read again at every handshake, so pairing and removal take effect at the
//! next connection without a restart.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;
use rustls::pki_types::CertificateDer;

use crate::identity::{parse_cert, pem, read, replace_file};
use crate::{Fingerprint, HostName, LinkError};

type Peers = Vec<(HostName, Fingerprint)>;

/// Trusted peers. Clones share what they know.
#[derive(Clone, Debug)]
pub struct TrustStore {
    /// `None` once frozen: then the directory is not looked at again.
    dir: Option<PathBuf>,
    peers: Arc<RwLock<Peers>>,
}

impl TrustStore {
    /// Opens `<data_dir>/trusted`; it need not exist yet.
    ///
    /// # Errors
    /// A file that cannot be read or is no certificate.
    pub fn open(data_dir: &Path) -> Result<TrustStore, LinkError> {
        let dir = data_dir.join("trusted");
        let peers = load(&dir)?;
        Ok(TrustStore {
            dir: Some(dir),
            peers: Arc::new(RwLock::new(peers)),
        })
    }

    /// A store of these certificates in memory.
    pub fn of<'a>(
        peers: impl IntoIterator<Item = (HostName, &'a CertificateDer<'static>)>,
    ) -> TrustStore {
        let peers = peers
            .into_iter()
            .map(|(name, cert)| (name, Fingerprint::of(cert)))
            .collect();
        TrustStore {
            dir: None,
            peers: Arc::new(RwLock::new(peers)),
        }
    }

    /// What is known now, without looking at the directory again: for a thread that must not
    /// wait for a disk.
    #[must_use]
    pub fn frozen(&self) -> TrustStore {
        TrustStore {
            dir: None,
            peers: Arc::new(RwLock::new(self.peers.read().clone())),
        }
    }

    /// Trusts `cert` as `name`. Trusting the same certificate again changes nothing.
    ///
    /// # Errors
    /// Another certificate is trusted under this name, or the file cannot be written.
    pub fn add(&self, name: &HostName, cert: &CertificateDer<'_>) -> Result<(), LinkError> {
        let fingerprint = Fingerprint::of(cert);
        self.refresh();
        let path = self.path(name);
        if let Some((_, old)) = self.peers.read().iter().find(|(n, _)| n == name) {
            if *old == fingerprint {
                return Ok(());
            }
            return Err(LinkError::AlreadyTrusted {
                name: name.clone(),
                fingerprint: *old,
                path: path.unwrap_or_default(),
            });
        }
        if let Some(path) = path {
            replace_file(&path, pem("CERTIFICATE", cert).as_bytes())?;
        }
        self.peers.write().push((name.clone(), fingerprint));
        Ok(())
    }

    /// Stops trusting `name`; true if it was trusted.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove(&self, name: &HostName) -> Result<bool, LinkError> {
        let mut removed = false;
        if let Some(path) = self.path(name) {
            match fs::remove_file(&path) {
                Ok(()) => removed = true,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    return Err(LinkError::File {
                        what: "remove",
                        path,
                        source,
                    });
                }
            }
        }
        let mut peers = self.peers.write();
        let before = peers.len();
        peers.retain(|(n, _)| n != name);
        Ok(removed || peers.len() != before)
    }

    /// The trusted names, sorted.
    pub fn names(&self) -> Vec<HostName> {
        self.refresh();
        let mut names: Vec<_> = self.peers.read().iter().map(|(n, _)| n.clone()).collect();
        names.sort();
        names
    }

    /// Who has this certificate, if a trusted peer.
    pub fn name_of(&self, fingerprint: &Fingerprint) -> Option<HostName> {
        self.refresh();
        self.peers
            .read()
            .iter()
            .find(|(_, f)| f == fingerprint)
            .map(|(n, _)| n.clone())
    }

    fn path(&self, name: &HostName) -> Option<PathBuf> {
        self.dir.as_ref().map(|dir| dir.join(format!("{name}.pem")))
    }

    /// Reads the directory again. If that fails, nobody is trusted: a pin that cannot be
    /// checked is not a pin.
    fn refresh(&self) {
        let Some(dir) = &self.dir else { return };
        let peers = load(dir).unwrap_or_else(|error| {
            tracing::error!(%error, "cannot read the trusted certificates; no peer is trusted");
            Peers::new()
        });
        *self.peers.write() = peers;
    }
}

fn load(dir: &Path) -> Result<Peers, LinkError> {
    let error = |source| LinkError::File {
        what: "read",
        path: dir.to_owned(),
        source,
    };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Peers::new()),
        Err(e) => return Err(error(e)),
    };
    let mut peers = Peers::new();
    for entry in entries {
        let path = entry.map_err(error)?.path();
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.strip_suffix(".pem"));
        // Temporaries begin with a dot and are no names.
        let Some(Ok(name)) = name.map(str::parse::<HostName>) else {
            continue;
        };
        let cert = parse_cert(&path, &read(&path)?)?;
        peers.push((name, Fingerprint::of(&cert)));
    }
    Ok(peers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Identity;

    fn identity(name: &str) -> Identity {
        Identity::generate(&name.parse().unwrap()).unwrap()
    }

    #[test]
    fn trust_survives_a_restart_and_ends_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let bert = identity("bert");
        let store = TrustStore::open(dir.path()).unwrap();
        assert_eq!(store.name_of(&bert.fingerprint()), None);
        store.add(bert.name(), bert.certificate()).unwrap();
        let other = TrustStore::open(dir.path()).unwrap();
        assert_eq!(
            other.name_of(&bert.fingerprint()).as_ref(),
            Some(bert.name())
        );
        fs::remove_file(dir.path().join("trusted/bert.pem")).unwrap();
        assert_eq!(store.name_of(&bert.fingerprint()), None);
    }

    #[test]
    fn a_second_certificate_under_a_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (identity("bert"), identity("bert"));
        let store = TrustStore::open(dir.path()).unwrap();
        store.add(old.name(), old.certificate()).unwrap();
        store.add(old.name(), old.certificate()).unwrap();
        let error = store
            .add(new.name(), new.certificate())
            .unwrap_err()
            .to_string();
        assert!(error.contains("pair again"), "{error}");
        assert!(store.remove(old.name()).unwrap());
        store.add(new.name(), new.certificate()).unwrap();
    }

    #[test]
    fn an_unreadable_store_trusts_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let bert = identity("bert");
        let store = TrustStore::open(dir.path()).unwrap();
        store.add(bert.name(), bert.certificate()).unwrap();
        fs::write(dir.path().join("trusted/anna.pem"), "junk").unwrap();
        assert_eq!(store.name_of(&bert.fingerprint()), None);
        assert!(TrustStore::open(dir.path()).is_err());
    }

    #[test]
    fn a_frozen_store_keeps_what_it_knew() {
        let dir = tempfile::tempdir().unwrap();
        let bert = identity("bert");
        let store = TrustStore::open(dir.path()).unwrap();
        store.add(bert.name(), bert.certificate()).unwrap();
        let frozen = store.frozen();
        assert!(store.remove(bert.name()).unwrap());
        assert!(frozen.name_of(&bert.fingerprint()).is_some());
    }
}
