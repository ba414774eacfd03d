//! Certificate files to rustls configurations, for the peers that speak TLS. Generation's nodes are verified by the native client's
//! own rule ([`generation_client::ClientConfig::tls`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::TargetError;

/// Where the certificates of a client lie.
#[derive(Clone, Debug, Default)]
pub struct TlsFiles {
    /// Authority that signed the server's certificate, PEM.
    pub ca: PathBuf,
    /// The client's certificate chain and key, PEM, where the server asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Name expected in the server's certificate; its address when absent.
    pub server_name: Option<String>,
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) -> TargetError {
    TargetError::Certificate {
        path: path.display().to_string(),
        message: error.to_string(),
    }
}

/// The certificates of a PEM file; at least one.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TargetError> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| unusable(path, &error))?;
    if certificates.is_empty() {
        Err(unusable(path, &"no certificate in it"))
    } else {
        Ok(certificates)
    }
}

/// The authorities of a PEM file.
pub fn roots(path: &Path) -> Result<RootCertStore, TargetError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| unusable(path, &error))?;
    }
    Ok(roots)
}

/// A client configuration; TLS 1.2 and 1.3, as the peers offer them.
pub fn client_config(files: &TlsFiles) -> Result<Arc<ClientConfig>, TargetError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TargetError::Settings(error.to_string()))?
        .with_root_certificates(roots(&files.ca)?);
    let config = match &files.identity {
        Some((chain, key)) => {
            let key_der = PrivateKeyDer::from_pem_file(key).map_err(|error| unusable(key, &error))?;
            builder
                .with_client_auth_cert(certificates(chain)?, key_der)
                .map_err(|error| unusable(chain, &error))?
        }
        None => builder.with_no_client_auth(),
    };
    Ok(Arc::new(config))
}
