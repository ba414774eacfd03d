//! Certificates for simulated nodes and clients. Ed25519 throughout: its signatures all have one length, so handshakes of
//! different runs are made of datagrams of the same sizes.

use std::sync::Arc;

use generation_node::peers::SERVER_NAME as NODE_NAME;
use generation_node::{Identity, Role};
use generation_quic::{ClientCrypto, ServerCrypto};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, PKCS_ED25519, SanType, SerialNumber};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The name in every simulated certificate.
pub(crate) const SERVER_NAME: &str = "localhost";

/// The serial number of every certificate. One made of the key would be a byte shorter now and then, and so would handshakes.
const SERIAL: u64 = 1;

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
    /// A certificate of the cluster's authority with this URI in it.
    Named(&'static str),
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
        params.serial_number = Some(SerialNumber::from(SERIAL));
        let key = KeyPair::generate_for(&PKCS_ED25519).expect("randomness");
        Self {
            issuer: CertifiedIssuer::self_signed(params, key).expect("a signature"),
        }
    }

    /// TLS of a node with this URI in its certificate, which asks for client certificates of this authority.
    ///
    /// # Panics
    /// When the operating system gives no randomness.
    pub fn server(&self, uri: &str, alpn: &[&[u8]]) -> ServerCrypto {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()), Arc::clone(&provider))
            .build()
            .expect("one root");
        let (chain, key) = self.issue(Some(uri), false);
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .expect("a key that fits its certificate");
        config.alpn_protocols = alpn.iter().map(|alpn| alpn.to_vec()).collect();
        ServerCrypto::new(Arc::new(config)).expect("fit for QUIC")
    }

    /// TLS of a client, or of a node that dials.
    ///
    /// # Panics
    /// When the operating system gives no randomness.
    pub fn client(&self, identity: ClientIdentity, alpn: &[u8]) -> ClientCrypto {
        let certificate = match identity {
            ClientIdentity::Good => Some(self.issue(None, false)),
            ClientIdentity::Missing => None,
            ClientIdentity::Foreign => Some(Self::new().issue(None, false)),
            ClientIdentity::Expired => Some(self.issue(None, true)),
            ClientIdentity::Named(uri) => Some(self.issue(Some(uri), false)),
        };
        self.dialling(certificate, alpn)
    }

    /// TLS of a node that dials, with this URI in its certificate.
    ///
    /// # Panics
    /// When the operating system gives no randomness.
    pub fn node(&self, uri: &str, alpn: &[u8]) -> ClientCrypto {
        self.dialling(Some(self.issue(Some(uri), false)), alpn)
    }

    fn dialling(
        &self,
        certificate: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
        alpn: &[u8],
    ) -> ClientCrypto {
        let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(self.roots());
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

    fn issue(&self, uri: Option<&str>, expired: bool) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let names = [SERVER_NAME, NODE_NAME].map(str::to_owned);
        let mut params = CertificateParams::new(names).expect("names");
        params.serial_number = Some(SerialNumber::from(SERIAL));
        if let Some(uri) = uri {
            let uri = uri.try_into().expect("an ASCII text");
            params.subject_alt_names.push(SanType::URI(uri));
        }
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

/// Who a certificate is of: whom its URI `generation://CLUSTER/node/ID` names, in `cluster`; without such a URI some client.
pub(crate) fn identity(certificates: &[CertificateDer<'_>], cluster: &str) -> Result<Identity, String> {
    let own = certificates.first().ok_or("no certificate")?;
    let (_, parsed) = X509Certificate::from_der(own).map_err(|error| error.to_string())?;
    let names = parsed.subject_alternative_name().map_err(|error| error.to_string())?;
    let uri = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .find_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix("generation://"),
            _ => None,
        });
    let Some(uri) = uri else {
        return Ok(Identity {
            role: Role::Client,
            name: "sim".to_owned(),
        });
    };
    let parts: Vec<&str> = uri.split('/').collect();
    match parts[..] {
        [other, ..] if other != cluster => Err(format!("cluster {other}, not {cluster}")),
        [_, role, name] => Ok(Identity {
            role: match role {
                "node" => Role::Node,
                "admin" => Role::Admin,
                _ => Role::Client,
            },
            name: name.to_owned(),
        }),
        _ => Err(format!("`{uri}` is no identity")),
    }
}
