//! A host's identity: its name, a self-signed certificate and the key.
//!
//! Made once, kept in `<data_dir>/identity/`: `name`, `cert.pem`, `key.pem` (mode 0600). The
//! directory appears whole or not at all. Certificates are pinned by fingerprint on the other
//! side, so nothing in them but the key matters; they do not expire.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest, Sha256};

use crate::{HostName, LinkError};

/// SHA-256 of a certificate's DER bytes; written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of a certificate.
    pub fn of(cert: &CertificateDer<'_>) -> Fingerprint {
        Fingerprint(Sha256::digest(cert.as_ref()).into())
    }
}

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl std::fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// A host's name, certificate and key. Cheap to clone.
#[derive(Clone)]
pub struct Identity {
    name: HostName,
    cert: CertificateDer<'static>,
    key: Arc<PrivateKeyDer<'static>>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key stays out of logs.
        write!(f, "Identity({}, {})", self.name, self.fingerprint())
    }
}

impl Identity {
    /// Makes a new identity in memory.
    ///
    /// # Errors
    /// The key cannot be made.
    pub fn generate(name: &HostName) -> Result<Identity, LinkError> {
        let failed = |e: rcgen::Error| LinkError::Certificate(e.to_string());
        let key = rcgen::KeyPair::generate().map_err(failed)?;
        let mut params = rcgen::CertificateParams::new([name.to_string()]).map_err(failed)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name.as_str());
        let cert = params.self_signed(&key).map_err(failed)?;
        Ok(Identity {
            name: name.clone(),
            cert: cert.der().clone(),
            key: Arc::new(PrivatePkcs8KeyDer::from(key.serialize_der()).into()),
        })
    }

    /// Loads the identity in `<data_dir>/identity`, or makes it there.
    ///
    /// # Errors
    /// Files that cannot be read or written, a key others can read, or an identity made for
    /// another name.
    pub fn load_or_create(data_dir: &Path, name: &HostName) -> Result<Identity, LinkError> {
        let dir = data_dir.join("identity");
        if !dir.exists() {
            Identity::generate(name)?.store(data_dir, &dir)?;
        }
        let identity = Identity::load(data_dir)?;
        if identity.name != *name {
            return Err(LinkError::BadFile {
                path: dir,
                problem: format!(
                    "this identity belongs to {}, the configuration says {name}; peers know the host as {}: set the name back, or remove the directory and pair again",
                    identity.name, identity.name
                ),
            });
        }
        Ok(identity)
    }

    /// Loads the identity in `<data_dir>/identity`.
    ///
    /// # Errors
    /// Missing or bad files, or a key that others can read.
    pub fn load(data_dir: &Path) -> Result<Identity, LinkError> {
        let dir = data_dir.join("identity");
        let path = dir.join("name");
        let name = read(&path)?;
        let name = HostName::from_str(name.trim()).map_err(|e| bad(&path, e.to_string()))?;
        let cert_path = dir.join("cert.pem");
        let cert = parse_cert(&cert_path, &read(&cert_path)?)?;
        let path = dir.join("key.pem");
        let mode = fs::metadata(&path)
            .map_err(|source| LinkError::File {
                what: "read",
                path: path.clone(),
                source,
            })?
            .permissions()
            .mode();
        if mode & 0o077 != 0 {
            return Err(bad(
                &path,
                format!(
                    "the key is open to others (mode {:o}); chmod 600 it, or make a new identity if it may have leaked",
                    mode & 0o777
                ),
            ));
        }
        let key = PrivateKeyDer::from_pem_slice(read(&path)?.as_bytes())
            .map_err(|e| bad(&path, format!("not a private key: {e}")))?;
        Ok(Identity {
            name,
            cert,
            key: Arc::new(key),
        })
    }

    fn store(&self, data_dir: &Path, dir: &Path) -> Result<(), LinkError> {
        let file = |what, path: &Path| {
            let path = path.to_owned();
            move |source| LinkError::File { what, path, source }
        };
        fs::create_dir_all(data_dir).map_err(file("create", data_dir))?;
        let temp = data_dir.join(format!(".identity.{}", std::process::id()));
        // A leftover of a crashed process that had the same number.
        match fs::remove_dir_all(&temp) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(file("remove", &temp)(e)),
            _ => {}
        }
        fs::create_dir(&temp).map_err(file("create", &temp))?;
        let key = pem("PRIVATE KEY", self.key.secret_der());
        let cert = pem("CERTIFICATE", &self.cert);
        let name = format!("{}\n", self.name);
        for (leaf, text, mode) in [
            ("key.pem", key, 0o600),
            ("cert.pem", cert, 0o644),
            ("name", name, 0o644),
        ] {
            let path = temp.join(leaf);
            write_durably(&path, text.as_bytes(), mode).map_err(file("write", &path))?;
        }
        match fs::rename(&temp, dir) {
            Ok(()) => {}
            // Somebody else made it meanwhile: theirs is the identity.
            Err(_) if dir.exists() => {
                fs::remove_dir_all(&temp).map_err(file("remove", &temp))?;
            }
            Err(e) => return Err(file("create", dir)(e)),
        }
        sync_dir(data_dir).map_err(file("sync", data_dir))
    }

    /// The host's name.
    pub fn name(&self) -> &HostName {
        &self.name
    }

    /// The certificate, DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.cert
    }

    /// The certificate's fingerprint.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.cert)
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

pub(crate) fn bad(path: &Path, problem: String) -> LinkError {
    LinkError::BadFile {
        path: path.to_owned(),
        problem,
    }
}

/// Reads a small text file; bounded, because a wrong file may be any size.
pub(crate) fn read(path: &Path) -> Result<String, LinkError> {
    use std::io::Read;
    let error = |source| LinkError::File {
        what: "read",
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    File::open(path)
        .map_err(error)?
        .take(64 << 10)
        .read_to_string(&mut text)
        .map_err(error)?;
    Ok(text)
}

pub(crate) fn parse_cert(path: &Path, text: &str) -> Result<CertificateDer<'static>, LinkError> {
    CertificateDer::from_pem_slice(text.as_bytes())
        .map_err(|e| bad(path, format!("not a certificate: {e}")))
}

pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    let text = data_encoding::BASE64.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        out.extend(line.iter().map(|b| char::from(*b)));
        out.push('\n');
    }
    out.push_str(&format!("-----END {label}-----\n"));
    out
}

pub(crate) fn write_durably(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Writes `bytes` to `path` so that it holds the old or the new content, whatever happens.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<(), LinkError> {
    let error = |what, path: &Path, source| LinkError::File {
        what,
        path: path.to_owned(),
        source,
    };
    let dir = path
        .parent()
        .map_or_else(|| PathBuf::from("."), Path::to_owned);
    fs::create_dir_all(&dir).map_err(|e| error("create", &dir, e))?;
    let leaf = path.file_name().unwrap_or_default().to_string_lossy();
    let temp = dir.join(format!(".{leaf}.{}", std::process::id()));
    match fs::remove_file(&temp) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(error("remove", &temp, e)),
        _ => {}
    }
    write_durably(&temp, bytes, 0o644).map_err(|e| error("write", &temp, e))?;
    fs::rename(&temp, path).map_err(|e| error("write", path, e))?;
    sync_dir(&dir).map_err(|e| error("sync", &dir, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(s: &str) -> HostName {
        s.parse().unwrap()
    }

    #[test]
    fn an_identity_is_made_once_and_its_key_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let made = Identity::load_or_create(dir.path(), &name("anna")).unwrap();
        let again = Identity::load_or_create(dir.path(), &name("anna")).unwrap();
        assert_eq!(made.fingerprint(), again.fingerprint());
        let key = dir.path().join("identity/key.pem");
        assert_eq!(
            fs::metadata(&key).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no temporary left"
        );
    }

    #[test]
    fn a_key_open_to_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Identity::load_or_create(dir.path(), &name("anna")).unwrap();
        let key = dir.path().join("identity/key.pem");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        let error = Identity::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn another_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Identity::load_or_create(dir.path(), &name("anna")).unwrap();
        let error = Identity::load_or_create(dir.path(), &name("bert"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("belongs to anna"), "{error}");
    }

    #[test]
    fn racing_creators_end_with_one_identity() {
        let dir = tempfile::tempdir().unwrap();
        // Threads share the process number, so the temporary's name differs by directory only:
        // the race is between a finished identity and a late creator.
        let first = Identity::load_or_create(dir.path(), &name("anna")).unwrap();
        let late = Identity::generate(&name("anna")).unwrap();
        late.store(dir.path(), &dir.path().join("identity"))
            .unwrap();
        assert_eq!(
            Identity::load(dir.path()).unwrap().fingerprint(),
            first.fingerprint()
        );
    }
}
