//! TLS 1.3 with pinned certificates on both sides.
//!
//! No CA, no names, no expiry, no TLS 1.2, no resumption (a resumed session would outlive the
//! removal of its pin). That the peer holds the key of its certificate is still proven by the
//! handshake's signature, checked by the provider.

use std::sync::{Arc, LazyLock};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName,
    Error, OtherError, PeerIncompatible, ServerConfig, ServerConnection, SignatureScheme,
};

use crate::{Fingerprint, Identity, LinkError, TrustStore};

/// Protocol names (ALPN): a link client that reaches a pairing port is told so, and vice versa.
pub(crate) const LINK: &[u8] = b"ax-link";
pub(crate) const PAIRING: &[u8] = b"ax-pairing";

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = ring::default_provider();
    // AES-128 first: the link is bound by its cost per byte.
    provider.cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
});

/// Which peers' certificates are good.
#[derive(Clone, Debug)]
pub(crate) enum Pins {
    /// Those of the trusted peers.
    Trusted(TrustStore),
    /// This one only (the joining side of a pairing).
    Exactly(Fingerprint),
    /// Any, for now: the listening side of a pairing, which goes on to demand the secret.
    AnyForPairing,
}

#[derive(Debug, thiserror::Error)]
#[error("the peer's certificate {0} is not trusted here; pair the hosts (axd pair)")]
struct Untrusted(Fingerprint);

#[derive(Debug)]
struct Verifier(Pins);

impl Verifier {
    fn check(&self, cert: &CertificateDer<'_>) -> Result<(), Error> {
        let fingerprint = Fingerprint::of(cert);
        let good = match &self.0 {
            Pins::Trusted(store) => store.name_of(&fingerprint).is_some(),
            Pins::Exactly(expected) => *expected == fingerprint,
            Pins::AnyForPairing => true,
        };
        if good {
            return Ok(());
        }
        let why = OtherError(Arc::new(Untrusted(fingerprint)));
        Err(Error::InvalidCertificate(CertificateError::Other(why)))
    }

    fn signature(
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &PROVIDER.signature_verification_algorithms,
        )
    }

    fn no_tls12() -> Error {
        Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled)
    }

    fn schemes() -> Vec<SignatureScheme> {
        PROVIDER
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Self::no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Self::no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

fn failed(error: Error) -> LinkError {
    LinkError::Certificate(error.to_string())
}

/// A client's side of a connection.
pub(crate) fn client(
    identity: &Identity,
    pins: Pins,
    protocol: &[u8],
) -> Result<ClientConnection, LinkError> {
    let mut config = ClientConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(failed)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier(pins)))
        .with_client_auth_cert(vec![identity.certificate().clone()], identity.key())
        .map_err(failed)?;
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    // Required by the interface; neither sent nor checked.
    let name = ServerName::try_from("ax").map_err(|e| LinkError::Certificate(e.to_string()))?;
    ClientConnection::new(Arc::new(config), name).map_err(failed)
}

/// A server's side of a connection.
pub(crate) fn server(
    identity: &Identity,
    pins: Pins,
    protocol: &[u8],
) -> Result<ServerConnection, LinkError> {
    let mut config = ServerConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(failed)?
        .with_client_cert_verifier(Arc::new(Verifier(pins)))
        .with_single_cert(vec![identity.certificate().clone()], identity.key())
        .map_err(failed)?;
    config.alpn_protocols = vec![protocol.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    ServerConnection::new(Arc::new(config)).map_err(failed)
}

/// Fills `out` with random bytes from the provider.
pub(crate) fn random(out: &mut [u8]) -> Result<(), LinkError> {
    PROVIDER
        .secure_random
        .fill(out)
        .map_err(|_| LinkError::Certificate("the system gives no random numbers".into()))
}
