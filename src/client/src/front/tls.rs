//! TLS of a connection to a node: who the node must be.
//!
//! A node is known by the URI in its certificate, `generation://CLUSTER/node/ID`, under the cluster's authority; not by its
//! address, which changes and is shared behind a load balancer. The chain is verified as rustls does it (`WebPkiServerVerifier`
//! without the host name); the signature of the handshake as always.

use std::fmt;
use std::sync::{Arc, Mutex};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::config::{ClientConfig, Credential};
use crate::core::error::ConnectError;

/// What a client shows and whom it trusts; read once, when the client connects.
pub(crate) struct Identity {
    cluster: Arc<str>,
    roots: Arc<RootCertStore>,
    certificate: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("cluster", &self.cluster)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads the credentials.
    pub(crate) fn load(
        cluster: &str,
        ca: &Credential,
        certificate: Option<&Credential>,
        key: Option<&Credential>,
    ) -> Result<Self, ConnectError> {
        let mut roots = RootCertStore::empty();
        for root in ca.certificates("the authority's certificate (`ca`)")? {
            roots.add(root).map_err(|error| {
                ConnectError::Config(format!("the authority's certificate (`ca`) is wrong: {error}"))
            })?;
        }
        let (certificate, key) = match (certificate, key) {
            (Some(certificate), Some(key)) => (
                certificate.certificates("the client's certificate (`certificate`)")?,
                key.key("the client's private key (`key`)")?,
            ),
            _ => {
                return Err(ConnectError::Config(
                    "a client needs a certificate and its key: make them with `generation certs client` and name them as \
                     `certificate` and `key`"
                        .to_owned(),
                ));
            }
        };
        Ok(Self {
            cluster: cluster.into(),
            roots: Arc::new(roots),
            certificate,
            key,
            provider: Arc::new(rustls::crypto::ring::default_provider()),
        })
    }

    /// Fills `bytes` with random ones.
    pub(crate) fn random(&self, bytes: &mut [u8]) -> Result<(), ConnectError> {
        self.provider
            .secure_random
            .fill(bytes)
            .map_err(|_| ConnectError::Config("the system gives no random bytes".to_owned()))
    }

    /// The TLS configuration of one connection, to `node` if its id is known. Why a node was refused is left in `refused`.
    pub(crate) fn tls(&self, node: Option<u64>, refused: Refused) -> Result<rustls::ClientConfig, ConnectError> {
        let unusable = |error: rustls::Error| {
            ConnectError::Config(format!("the client's certificate and key cannot be used: {error}"))
        };
        let verifier = NodeVerifier {
            cluster: self.cluster.clone(),
            node,
            roots: self.roots.clone(),
            provider: self.provider.clone(),
            refused,
        };
        let mut tls = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(self.certificate.clone(), self.key.clone_key())
            .map_err(unusable)?;
        tls.alpn_protocols = vec![generation_proto::ALPN_CLIENT.to_vec()];
        // A resumed handshake shows no certificate, and the certificate is what a node is known by.
        tls.resumption = Resumption::disabled();
        Ok(tls)
    }
}

impl ClientConfig {
    /// The TLS configuration that the client itself uses, for programs that drive QUIC with a loop of their own: any node of the
    /// cluster is accepted, nobody else. Why a node was refused is left in the second part.
    ///
    /// # Errors
    /// [`ConnectError::Config`] when a file that the configuration names is missing or not what it should be.
    pub fn tls(&self) -> Result<(rustls::ClientConfig, Refused), ConnectError> {
        let file = |path: &std::path::PathBuf| Credential::File(path.clone());
        let (ca, certificate, key) = (file(&self.ca), file(&self.certificate), file(&self.key));
        let refused = Refused::default();
        let tls = Identity::load(&self.cluster, &ca, Some(&certificate), Some(&key))?.tls(None, refused.clone())?;
        Ok((tls, refused))
    }
}

/// Where the verifier leaves its reason: TLS itself carries an alert number and no more.
pub type Refused = Arc<Mutex<Option<String>>>;

#[derive(Debug)]
struct NodeVerifier {
    cluster: Arc<str>,
    node: Option<u64>,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    refused: Refused,
}

impl NodeVerifier {
    fn refuse(&self, reason: String) {
        if let Ok(mut refused) = self.refused.lock() {
            *refused = Some(reason);
        }
    }
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        ParsedCertificate::try_from(end_entity)
            .and_then(|parsed| {
                verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)
            })
            .inspect_err(|error| self.refuse(explain_chain(error)))?;
        check_identity(end_entity, &self.cluster, self.node).map_err(|reason| {
            self.refuse(reason);
            rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
        })?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Whether a certificate, already verified, is that of `node` (of any node, where it is not known) in `cluster`.
fn check_identity(der: &[u8], cluster: &str, node: Option<u64>) -> Result<(), String> {
    let unreadable = "it cannot be read as an X.509 certificate".to_owned();
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| unreadable.clone())?;
    let names = certificate.subject_alternative_name().map_err(|_| unreadable)?;
    let mut uris = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix("generation://"),
            _ => None,
        });
    let (Some(identity), None) = (uris.next(), uris.next()) else {
        return Err("it must name exactly one generation:// identity: make it with `generation certs node`".to_owned());
    };
    let Some((found, role)) = identity.split_once('/') else {
        return Err(format!("its identity generation://{identity} names no role"));
    };
    if found != cluster {
        return Err(format!(
            "it is of the cluster `{found}`, not `{cluster}`: check `seeds` and `cluster`"
        ));
    }
    let id = role.strip_prefix("node/").and_then(|id| id.parse::<u64>().ok());
    match (id, node) {
        (None, _) => Err(format!("it is that of `{role}`, not of a node")),
        (Some(found), Some(expected)) if found != expected => Err(format!(
            "it is that of node {found}, and node {expected} should be at this address"
        )),
        (Some(_), _) => Ok(()),
    }
}

/// What a chain's refusal means to someone who has to mend it.
fn explain_chain(error: &rustls::Error) -> String {
    use CertificateError as C;
    match error {
        rustls::Error::InvalidCertificate(C::UnknownIssuer | C::BadSignature) => {
            "it was not signed by the authority in `ca`: use the `ca` of this cluster".to_owned()
        }
        rustls::Error::InvalidCertificate(C::Expired | C::ExpiredContext { .. }) => {
            "it has expired: renew it with `generation certs node` (or the clock of this machine is wrong)".to_owned()
        }
        rustls::Error::InvalidCertificate(C::NotValidYet | C::NotValidYetContext { .. }) => {
            "it is not valid yet: compare the clocks of this machine and the node's".to_owned()
        }
        rustls::Error::InvalidCertificate(C::InvalidPurpose | C::InvalidPurposeContext { .. }) => {
            "it is not meant for a server: make it with `generation certs node`".to_owned()
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    fn check(uris: &[&str], node: Option<u64>) -> Result<(), String> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris.iter().map(|&uri| SanType::URI(uri.try_into().unwrap())).collect();
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        check_identity(certificate.der(), "prod", node)
    }

    #[test]
    fn a_node_is_known_by_its_uri() {
        assert_eq!(check(&["generation://prod/node/3"], None), Ok(()));
        assert_eq!(
            check(&["generation://prod/node/3", "https://example.org"], Some(3)),
            Ok(())
        );
        for (uris, reason) in [
            (&["generation://prod/node/4"][..], "node 4, and node 3"),
            (&["generation://test/node/3"], "cluster `test`, not `prod`"),
            (&["generation://prod/client/3"], "not of a node"),
            (&["generation://prod/admin/root"], "not of a node"),
            (&["generation://prod"], "no role"),
            (&["generation://prod/node/3", "generation://prod/node/4"], "exactly one"),
            (&["https://prod/node/3"], "exactly one"),
            (&[], "exactly one"),
        ] {
            let refused = check(uris, Some(3)).unwrap_err();
            assert!(refused.contains(reason), "{refused}");
        }
    }
}
