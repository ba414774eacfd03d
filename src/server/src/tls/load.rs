//! A node's certificates from files, checked before they are used, and exchanged while it runs.
//!
//! Every error names the file and what to do about it. What [`load`] accepts, handshakes accept: the node's own certificate is
//! verified against the authority with the very verifier that clients are verified with.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::CryptoProvider;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, InconsistentKeys, RootCertStore,
    ServerConfig, SignatureScheme,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use super::identity::{Identity, IdentityError, Role};

/// Permission bits a private key's file must not have: writable by its group, anything for others.
pub(crate) const KEY_EXPOSED: u32 = 0o027;

/// Where a node's certificates are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The authority's certificate, or several: each is trusted.
    pub ca: PathBuf,
    /// The node's certificate, followed by intermediates if there are any.
    pub certificate: PathBuf,
    /// The node's private key.
    pub key: PathBuf,
}

/// Why certificates cannot be used. Nothing was changed: a node that is running keeps those it has.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file is not there.
    #[error("{}: there is no such file; `generation certs` makes one, or name another in the configuration's [tls]", .0.display())]
    Missing(PathBuf),
    /// A file cannot be read.
    #[error("{}: {error}; the user that runs the server must be able to read it", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A file holds something else.
    #[error("{}: it holds no {wanted} in PEM form (-----BEGIN …-----)", .path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        wanted: &'static str,
    },
    /// A private key's file is open to others.
    #[error("{}: mode {mode:03o} lets others at the private key; run `chmod 600 {}`", .path.display(), .path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The key is of a kind that is not supported.
    #[error("{}: {reason}; use an ECDSA P-256 or Ed25519 key, as `generation certs` makes", .path.display())]
    Key {
        /// The key's file.
        path: PathBuf,
        /// What the library said.
        reason: String,
    },
    /// Key and certificate are of different pairs.
    #[error("{}: this private key does not belong to the certificate {}", .key.display(), .certificate.display())]
    KeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// The certificate's time is over.
    #[error("{}: the certificate has expired; sign a new one with `generation certs node`", .0.display())]
    Expired(PathBuf),
    /// The certificate's time has not come.
    #[error("{}: the certificate is not valid yet; check this machine's clock", .0.display())]
    NotYetValid(PathBuf),
    /// Another authority signed it.
    #[error("{}: the certificate was not signed by the authority in {}", .certificate.display(), .ca.display())]
    OtherAuthority {
        /// The certificate's file.
        certificate: PathBuf,
        /// The authority's file.
        ca: PathBuf,
    },
    /// The certificate cannot be used for another reason.
    #[error("{}: {reason}", .path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The certificate does not say who its holder is.
    #[error("{}: {error}; sign one with `generation certs node ID`", .path.display())]
    Identity {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: IdentityError,
    },
    /// The certificate is that of somebody else.
    #[error("{}: it is the certificate of {identity}, and a server needs a node's; sign one with `generation certs node ID`", .path.display())]
    NotANode {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        identity: Box<Identity>,
    },
    /// A reload would make the node another one.
    #[error("{}: it is the certificate of {new}, and this server runs as {old}; restart it to change that", .path.display())]
    OtherIdentity {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        new: Box<Identity>,
        /// Who the server is.
        old: Box<Identity>,
    },
}

/// Certificates that were checked and are ready for use.
#[derive(Debug)]
pub struct Material {
    /// Who this node is.
    pub identity: Identity,
    certified: Arc<CertifiedKey>,
    verifier: Arc<dyn ClientCertVerifier>,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

/// Reads and checks a node's certificates.
pub fn load(files: &TlsFiles) -> Result<Material, LoadError> {
    let provider = provider();
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.ca)? {
        roots.add(certificate).map_err(|error| LoadError::Unusable {
            path: files.ca.clone(),
            reason: format!("it is not an authority's certificate ({error})"),
        })?;
    }
    let chain = certificates(&files.certificate)?;
    let key = private_key(&files.key)?;
    let certified = CertifiedKey::from_der(chain.clone(), key, &provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => LoadError::KeyMismatch {
            key: files.key.clone(),
            certificate: files.certificate.clone(),
        },
        rustls::Error::InvalidCertificate(_) => LoadError::Unusable {
            path: files.certificate.clone(),
            reason: error.to_string(),
        },
        _ => LoadError::Key {
            path: files.key.clone(),
            reason: error.to_string(),
        },
    })?;
    let roots = Arc::new(roots);
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
        .build()
        .map_err(|error| LoadError::Unusable {
            path: files.ca.clone(),
            reason: error.to_string(),
        })?;
    let Some((own, intermediates)) = chain.split_first() else {
        return Err(LoadError::NotPem {
            path: files.certificate.clone(),
            wanted: "certificate",
        });
    };
    verifier
        .verify_client_cert(own, intermediates, UnixTime::now())
        .map_err(|error| verification(files, error))?;
    let path = || files.certificate.clone();
    let identity = Identity::from_certificate(own).map_err(|error| LoadError::Identity { path: path(), error })?;
    if !matches!(identity.role, Role::Node(_)) {
        return Err(LoadError::NotANode {
            path: path(),
            identity: Box::new(identity),
        });
    }
    Ok(Material {
        identity,
        certified: Arc::new(certified),
        verifier,
        roots,
        provider,
    })
}

fn verification(files: &TlsFiles, error: rustls::Error) -> LoadError {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext, UnknownIssuer};
    let path = files.certificate.clone();
    match error {
        rustls::Error::InvalidCertificate(Expired | ExpiredContext { .. }) => LoadError::Expired(path),
        rustls::Error::InvalidCertificate(NotValidYet | NotValidYetContext { .. }) => LoadError::NotYetValid(path),
        rustls::Error::InvalidCertificate(UnknownIssuer | CertificateError::BadSignature) => {
            LoadError::OtherAuthority {
                certificate: path,
                ca: files.ca.clone(),
            }
        }
        error => LoadError::Unusable {
            path,
            reason: error.to_string(),
        },
    }
}

fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    fs::read(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => LoadError::Missing(path.to_owned()),
        _ => LoadError::Unreadable {
            path: path.to_owned(),
            error,
        },
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    let bytes = read(path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(LoadError::NotPem {
            path: path.to_owned(),
            wanted: "certificate",
        }),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, LoadError> {
    let bytes = read(path)?;
    let metadata = fs::metadata(path).map_err(|error| LoadError::Unreadable {
        path: path.to_owned(),
        error,
    })?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & KEY_EXPOSED != 0 {
        return Err(LoadError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| LoadError::NotPem {
        path: path.to_owned(),
        wanted: "private key",
    })
}

/// The ring provider, AES-128 first: it is the fastest where the processor has AES, and as strong as the P-256 keys beside it.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// The certificates in use. Handshakes take whatever is current; connections that exist keep what they began with.
#[derive(Debug)]
pub struct Certificates {
    files: TlsFiles,
    current: RwLock<Arc<Material>>,
}

impl Certificates {
    /// Loads them for the first time.
    pub fn load(files: TlsFiles) -> Result<Arc<Self>, LoadError> {
        let material = Arc::new(load(&files)?);
        Ok(Arc::new(Self {
            files,
            current: RwLock::new(material),
        }))
    }

    /// Loads them again. On an error those in use stay in use.
    pub fn reload(&self) -> Result<(), LoadError> {
        let material = load(&self.files)?;
        let old = self.identity();
        if material.identity != old {
            let path = self.files.certificate.clone();
            return Err(LoadError::OtherIdentity {
                path,
                new: Box::new(material.identity),
                old: Box::new(old),
            });
        }
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(material);
        Ok(())
    }

    /// Who this node is.
    pub fn identity(&self) -> Identity {
        self.material().identity.clone()
    }

    fn material(&self) -> Arc<Material> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The accepting side's TLS: 1.3 only, client certificates required, nothing resumed. A resumed session would skip the
    /// verification of the client's certificate, and connections are few and long-lived.
    pub fn server_config(self: &Arc<Self>, alpn: &[&[u8]]) -> Result<ServerConfig, rustls::Error> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::clone(self) as _)
            .with_cert_resolver(Arc::clone(self) as _);
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config.ignore_client_order = true;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }

    /// TLS to dial other nodes with: 1.3 only, this node's own certificate, nothing resumed. The other side must show a
    /// certificate of the cluster's authority, whatever name is asked for: which node it is of is for the caller to see.
    pub fn dialling_config(self: &Arc<Self>, alpn: &[u8]) -> Result<ClientConfig, rustls::Error> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(self) as _)
            .with_client_cert_resolver(Arc::clone(self) as _);
        config.alpn_protocols = vec![alpn.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }
}

impl ResolvesClientCert for Certificates {
    fn resolve(&self, _issuers: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.material().certified))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ServerCertVerifier for Certificates {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let material = self.material();
        let algorithms = material.provider.signature_verification_algorithms.all;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        // Nodes are known by the URI in their certificates, so no name is compared.
        verify_server_cert_signed_by_trust_anchor(&parsed, &material.roots, intermediates, now, algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ClientCertVerifier::verify_tls12_signature(self, message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ClientCertVerifier::verify_tls13_signature(self, message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ClientCertVerifier::supported_verify_schemes(self)
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.material().certified))
    }
}

impl ClientCertVerifier for Certificates {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Clients have one certificate; a hint would only tell strangers the authority's name.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.material()
            .verifier
            .verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.material()
            .verifier
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.material()
            .verifier
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.material().verifier.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::issue::{Authority, Issued};
    use std::time::{Duration, SystemTime};

    const DAY: Duration = Duration::from_hours(24);

    struct Fixture {
        directory: tempfile::TempDir,
        authority: Authority,
        files: TlsFiles,
    }

    impl Fixture {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let authority = Authority::new("prod", 10 * DAY, SystemTime::now()).unwrap();
            let at = |name: &str| directory.path().join(name);
            let files = TlsFiles {
                ca: at("ca.pem"),
                certificate: at("node.pem"),
                key: at("node.key"),
            };
            fs::write(&files.ca, authority.certificate_pem()).unwrap();
            let fixture = Self {
                directory,
                authority,
                files,
            };
            fixture.write(&fixture.issue(Role::Node(1)));
            fixture
        }

        fn issue(&self, role: Role) -> Issued {
            self.authority.issue(role, &[], DAY, SystemTime::now()).unwrap()
        }

        fn write(&self, issued: &Issued) {
            fs::write(&self.files.certificate, &issued.certificate_pem).unwrap();
            fs::write(&self.files.key, &issued.key_pem).unwrap();
            self.chmod(0o600);
        }

        fn chmod(&self, mode: u32) {
            fs::set_permissions(&self.files.key, fs::Permissions::from_mode(mode)).unwrap();
        }

        /// The message of the error, which must name `path`.
        fn refused(&self, path: &Path) -> LoadError {
            let error = load(&self.files).unwrap_err();
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
            error
        }
    }

    #[test]
    fn good_certificates_are_taken() {
        let fixture = Fixture::new();
        let material = load(&fixture.files).unwrap();
        assert_eq!(material.identity, "generation://prod/node/1".parse().unwrap());
        for mode in [0o400, 0o600, 0o640] {
            fixture.chmod(mode);
            load(&fixture.files).unwrap();
        }
        let certificates = Certificates::load(fixture.files.clone()).unwrap();
        certificates.server_config(&[b"generation/1"]).unwrap();
    }

    #[test]
    fn every_mistake_names_the_file() {
        let fixture = Fixture::new();
        let files = fixture.files.clone();
        for mode in [0o604, 0o660, 0o777] {
            fixture.chmod(mode);
            let error = fixture.refused(&files.key);
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        fixture.chmod(0o600);

        let good = fixture.issue(Role::Node(1));
        fixture.write(&Issued {
            key_pem: fixture.issue(Role::Node(1)).key_pem,
            ..good
        });
        assert!(matches!(fixture.refused(&files.key), LoadError::KeyMismatch { .. }));

        let before = SystemTime::now() - 5 * DAY;
        let authority = Authority::new("prod", 10 * DAY, before).unwrap();
        let expired = authority.issue(Role::Node(1), &[], DAY, before).unwrap();
        let other = authority.issue(Role::Node(1), &[], DAY, SystemTime::now()).unwrap();
        fixture.write(&other);
        assert!(matches!(
            fixture.refused(&files.certificate),
            LoadError::OtherAuthority { .. }
        ));
        fixture.write(&expired);
        fs::write(&files.ca, authority.certificate_pem()).unwrap();
        assert!(matches!(fixture.refused(&files.certificate), LoadError::Expired(_)));
        let early = authority
            .issue(Role::Node(1), &[], DAY, SystemTime::now() + 2 * DAY)
            .unwrap();
        fixture.write(&early);
        assert!(matches!(fixture.refused(&files.certificate), LoadError::NotYetValid(_)));
        fs::write(&files.ca, fixture.authority.certificate_pem()).unwrap();

        fixture.write(&fixture.issue(Role::Client("web".into())));
        assert!(matches!(
            fixture.refused(&files.certificate),
            LoadError::NotANode { .. }
        ));

        fixture.write(&fixture.issue(Role::Node(1)));
        let key = fs::read(&files.key).unwrap();
        for (path, content) in [
            (&files.ca, "nonsense"),
            (&files.certificate, ""),
            (&files.key, "nonsense"),
        ] {
            let kept = fs::read(path).unwrap();
            fs::write(path, content).unwrap();
            assert!(matches!(fixture.refused(path), LoadError::NotPem { .. }));
            fs::remove_file(path).unwrap();
            assert!(matches!(fixture.refused(path), LoadError::Missing(_)));
            fs::write(path, kept).unwrap();
            fixture.chmod(0o600);
        }
        // Key and certificate exchanged.
        fs::write(&files.key, fs::read(&files.certificate).unwrap()).unwrap();
        assert!(matches!(fixture.refused(&files.key), LoadError::NotPem { .. }));
        fs::write(&files.key, key).unwrap();
        fs::create_dir(fixture.directory.path().join("d")).unwrap();
        let directory = TlsFiles {
            ca: fixture.directory.path().join("d"),
            ..files
        };
        assert!(matches!(load(&directory), Err(LoadError::Unreadable { .. })));
    }

    #[test]
    fn a_certificate_without_an_identity_is_refused() {
        let fixture = Fixture::new();
        // The authority's own certificate names nobody. It is self-signed, so it is no end entity either way.
        fixture.write(&Issued {
            certificate_pem: fixture.authority.certificate_pem().to_owned(),
            key_pem: fixture.authority.key_pem().to_owned(),
        });
        let path = fixture.files.certificate.clone();
        assert!(matches!(
            fixture.refused(&path),
            LoadError::Unusable { .. } | LoadError::Identity { .. }
        ));
        // A certificate of the authority with no URI at all.
        let key = rcgen::KeyPair::generate().unwrap();
        let signer = rcgen::KeyPair::from_pem(fixture.authority.key_pem()).unwrap();
        let issuer = rcgen::Issuer::from_ca_cert_pem(fixture.authority.certificate_pem(), signer).unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let certificate_pem = params.signed_by(&key, &issuer).unwrap().pem();
        fixture.write(&Issued {
            certificate_pem,
            key_pem: key.serialize_pem(),
        });
        assert!(matches!(
            fixture.refused(&path),
            LoadError::Identity {
                error: IdentityError::Missing,
                ..
            }
        ));
    }

    #[test]
    fn a_reload_takes_new_certificates_and_keeps_the_old_ones_when_they_are_bad() {
        let fixture = Fixture::new();
        let certificates = Certificates::load(fixture.files.clone()).unwrap();
        let first = certificates.material().certified.cert[0].clone();
        fixture.write(&fixture.issue(Role::Node(1)));
        certificates.reload().unwrap();
        let second = certificates.material().certified.cert[0].clone();
        assert_ne!(first, second);
        fs::write(&fixture.files.certificate, "nonsense").unwrap();
        certificates.reload().unwrap_err();
        fixture.write(&fixture.issue(Role::Node(2)));
        assert!(matches!(certificates.reload(), Err(LoadError::OtherIdentity { .. })));
        assert_eq!(certificates.material().certified.cert[0], second);
    }
}
