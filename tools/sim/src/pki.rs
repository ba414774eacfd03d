//! Certificates for simulated nodes and clients. Ed25519 throughout: its signatures all have one length, so handshakes of
//! different runs are made of datagrams of the same sizes.

use std::sync::Arc;

use generation_quic::{ClientCrypto, ServerCrypto};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, PKCS_ED25519};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;

/// The name in every simulated certificate.
pub(crate) const SERVER_NAME: &str = "localhost";

/// A certificate authority that lives as long as a simulation.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What a client identifies itself with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientIdentity {
    /// A certificate of the cluster's authority.
    Good,
    /// None.
    Missing,
    /// A certificate of some other authority.
    Foreign,
    /// A certificate of the cluster's authority whose time is over.
    Expired,
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl Authority {
    /// A new authority.
    ///
    /// # Panics
    /// When the operating system gives no randomness.
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names to be wrong");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate_for(&PKCS_ED25519).expect("randomness");
        Self {
            issuer: CertifiedIssuer::self_signed(params, key).expect("a signature"),
        }
    }

    /// TLS of a node, which asks for client certificates of this authority.
    ///
    /// # Panics
    /// When the operating system gives no randomness.
    pub fn server(&self, alpn: &[u8]) -> ServerCrypto {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()), Arc::clone(&provider))
            .build()
            .expect("one root");
        let (chain, key) = self.issue(false);
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .expect("a key that fits its certificate");
        config.alpn_protocols = vec![alpn.to_vec()];
        ServerCrypto::new(Arc::new(config)).expect("fit for QUIC")
    }

    /// TLS of a client.
    ///
    /// # Panics
    /// When the operating system gives no randomness.
    pub fn client(&self, identity: ClientIdentity, alpn: &[u8]) -> ClientCrypto {
        let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(self.roots());
        let certificate = match identity {
            ClientIdentity::Good => Some(self.issue(false)),
            ClientIdentity::Missing => None,
            ClientIdentity::Foreign => Some(Self::new().issue(false)),
            ClientIdentity::Expired => Some(self.issue(true)),
        };
        let mut config = match certificate {
            Some((chain, key)) => builder
                .with_client_auth_cert(chain, key)
                .expect("a key that fits its certificate"),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        // A resumed handshake is shorter, and whether one resumes must not depend on what ran before.
        config.resumption = rustls::client::Resumption::disabled();
        ClientCrypto::new(Arc::new(config)).expect("fit for QUIC")
    }

    fn issue(&self, expired: bool) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()]).expect("a name");
        if expired {
            params.not_before = rcgen::date_time_ymd(2001, 1, 1);
            params.not_after = rcgen::date_time_ymd(2002, 1, 1);
        }
        let key = KeyPair::generate_for(&PKCS_ED25519).expect("randomness");
        let certificate = params.signed_by(&key, &self.issuer).expect("a signature");
        (
            vec![certificate.der().clone()],
            PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        )
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).expect("a certificate");
        roots
    }
}
