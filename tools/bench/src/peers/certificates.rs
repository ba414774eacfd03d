//! Throw-away certificates for the peers that speak TLS.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::PeerError;

/// An authority and a server certificate for loopback, as PEM files (ECDSA P-256).
#[derive(Clone, Debug)]
pub struct Certificates {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The server's certificate.
    pub certificate: PathBuf,
    /// The server's key.
    pub key: PathBuf,
}

impl Certificates {
    /// Writes them into a directory.
    pub fn make(directory: &Path) -> Result<Self, PeerError> {
        let failed = |error: rcgen::Error| PeerError::Certificates(error.to_string());
        let ca_key = KeyPair::generate().map_err(failed)?;
        let mut ca_params = CertificateParams::new(Vec::new()).map_err(failed)?;
        ca_params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = ca_params.self_signed(&ca_key).map_err(failed)?;
        let issuer = Issuer::new(ca_params, ca_key);
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])
            .and_then(|params| params.signed_by(&key, &issuer))
            .map_err(failed)?;
        let write = |name: &str, text: String| {
            let path = directory.join(name);
            fs::write(&path, text)
                .map(|()| path.clone())
                .map_err(PeerError::system(path.display().to_string()))
        };
        Ok(Self {
            ca: write("ca.pem", ca.pem())?,
            certificate: write("server.pem", certificate.pem())?,
            key: write("server.key", key.serialize_pem())?,
        })
    }
}
