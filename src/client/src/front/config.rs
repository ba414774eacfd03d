//! Where the cluster is and who the client is: the configuration file and the pieces it names.

use std::path::{Path, PathBuf};

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::Deserialize;

use crate::core::error::ConnectError;

/// The contents of a `client.toml`, as `generation dev` writes it:
///
/// ```toml
/// cluster = "dev"                     # name of the cluster; nodes of another are refused
/// seeds = ["127.0.0.1:7400"]          # HOST:PORT of at least one node; the others are found through it
/// ca = "ca.pem"                       # certificate of the authority that signed the nodes' certificates
/// certificate = "client.pem"          # this client's certificate
/// key = "client.key"                  # and its private key
/// ```
///
/// Paths are relative to the file. Unknown keys are refused.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientConfig {
    /// Name of the cluster.
    pub cluster: String,
    /// Addresses of nodes, as `HOST:PORT`.
    pub seeds: Vec<String>,
    /// Path of the authority's certificate, PEM.
    pub ca: PathBuf,
    /// Path of the client's certificate, PEM.
    pub certificate: PathBuf,
    /// Path of the client's private key, PEM.
    pub key: PathBuf,
}

/// Why a configuration file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the client's configuration {}: {reason}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// The file does not hold what it should.
    #[error("the client's configuration {} is wrong: {reason}", .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
}

impl ClientConfig {
    /// Reads the file at `path`; paths in it come out relative to where the file is.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Unreadable {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        let mut config = Self::from_toml(&text).map_err(|reason| ConfigError::Invalid {
            path: path.to_owned(),
            reason,
        })?;
        let directory = path.parent().unwrap_or_else(|| Path::new(""));
        for file in [&mut config.ca, &mut config.certificate, &mut config.key] {
            *file = directory.join(&*file);
        }
        Ok(config)
    }

    fn from_toml(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        if config.seeds.is_empty() {
            return Err("`seeds` is empty: name at least one node as HOST:PORT".to_owned());
        }
        Ok(config)
    }
}

/// A certificate, a chain of certificates or a private key: from a file, from PEM text or in DER.
///
/// A path or a text is turned into the file of that path, so `builder.ca("ca.pem")` reads a file.
#[derive(Clone)]
pub enum Credential {
    /// A PEM file, read when the client connects.
    File(PathBuf),
    /// PEM text.
    Pem(Vec<u8>),
    /// DER, one item a certificate, the end entity's first.
    Der(Vec<Vec<u8>>),
}

impl Credential {
    /// PEM text.
    pub fn pem(text: impl Into<Vec<u8>>) -> Self {
        Self::Pem(text.into())
    }

    /// One certificate or key in DER.
    pub fn der(bytes: impl Into<Vec<u8>>) -> Self {
        Self::Der(vec![bytes.into()])
    }

    pub(super) fn certificates(&self, what: &str) -> Result<Vec<CertificateDer<'static>>, ConnectError> {
        let certificates = match self.pem_text(what)? {
            Some(text) => CertificateDer::pem_slice_iter(&text)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| self.unusable(what, &error.to_string()))?,
            None => self
                .der_items()
                .iter()
                .map(|der| CertificateDer::from(der.clone()))
                .collect(),
        };
        if certificates.is_empty() {
            return Err(self.unusable(what, "it holds no certificate"));
        }
        Ok(certificates)
    }

    pub(super) fn key(&self, what: &str) -> Result<PrivateKeyDer<'static>, ConnectError> {
        match self.pem_text(what)? {
            Some(text) => PrivateKeyDer::from_pem_slice(&text).map_err(|error| self.unusable(what, &error.to_string())),
            None => match self.der_items() {
                [der] => PrivateKeyDer::try_from(der.clone()).map_err(|error| self.unusable(what, error)),
                _ => Err(self.unusable(what, "it must be one key")),
            },
        }
    }

    fn pem_text(&self, what: &str) -> Result<Option<Vec<u8>>, ConnectError> {
        match self {
            Self::File(path) => std::fs::read(path)
                .map(Some)
                .map_err(|error| ConnectError::Config(format!("cannot read {what} {}: {error}", path.display()))),
            Self::Pem(text) => Ok(Some(text.clone())),
            Self::Der(_) => Ok(None),
        }
    }

    fn der_items(&self) -> &[Vec<u8>] {
        match self {
            Self::Der(items) => items,
            Self::File(_) | Self::Pem(_) => &[],
        }
    }

    fn unusable(&self, what: &str, reason: &str) -> ConnectError {
        let place = match self {
            Self::File(path) => format!(" {}", path.display()),
            Self::Pem(_) | Self::Der(_) => String::new(),
        };
        ConnectError::Config(format!("{what}{place} cannot be used: {reason}"))
    }
}

/// Says where a credential comes from, never what it is: it may be a private key.
impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "File({})", path.display()),
            Self::Pem(_) => f.write_str("Pem(..)"),
            Self::Der(_) => f.write_str("Der(..)"),
        }
    }
}

impl From<PathBuf> for Credential {
    fn from(path: PathBuf) -> Self {
        Self::File(path)
    }
}

impl From<&Path> for Credential {
    fn from(path: &Path) -> Self {
        Self::File(path.to_owned())
    }
}

impl From<&str> for Credential {
    fn from(path: &str) -> Self {
        Self::File(path.into())
    }
}

impl From<String> for Credential {
    fn from(path: String) -> Self {
        Self::File(path.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        cluster = "dev"
        seeds = ["127.0.0.1:7400"]
        ca = "ca.pem"
        certificate = "/etc/client.pem"
        key = "keys/client.key"
    "#;

    #[test]
    fn paths_are_relative_to_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("client.toml");
        std::fs::write(&path, GOOD).unwrap();
        let config = ClientConfig::load(&path).unwrap();
        assert_eq!(config.ca, directory.path().join("ca.pem"));
        assert_eq!(config.certificate, Path::new("/etc/client.pem"));
        assert_eq!(config.key, directory.path().join("keys/client.key"));
    }

    #[test]
    fn an_unknown_or_missing_key_is_refused_by_name() {
        let unknown = ClientConfig::from_toml(&format!("{GOOD}\nseed = 1")).unwrap_err();
        assert!(
            unknown.contains("unknown field `seed`") && unknown.contains("`seeds`"),
            "{unknown}"
        );
        let missing = ClientConfig::from_toml(&GOOD.replace("cluster", "# cluster")).unwrap_err();
        assert!(missing.contains("missing field `cluster`"), "{missing}");
        let empty = ClientConfig::from_toml(&GOOD.replace(r#""127.0.0.1:7400""#, "")).unwrap_err();
        assert!(empty.contains("HOST:PORT"), "{empty}");
        let error = ClientConfig::load("/nowhere/client.toml").unwrap_err();
        assert!(error.to_string().contains("/nowhere/client.toml"), "{error}");
    }

    #[test]
    fn a_private_key_is_not_printed() {
        let key = Credential::pem("-----BEGIN PRIVATE KEY-----");
        assert_eq!(format!("{key:?}"), "Pem(..)");
    }
}
