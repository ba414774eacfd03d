//! TLS configurations fit for QUIC: version 1.3, an application protocol named, no early data.

use std::sync::Arc;

use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};

/// A TLS configuration QUIC cannot use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// No cipher suite that QUIC's first packets need.
    #[error("the TLS configuration lacks TLS13_AES_128_GCM_SHA256, which QUIC's first packets need")]
    NoInitialCipherSuite,
    /// No application protocol.
    #[error("the TLS configuration names no application protocol (ALPN)")]
    NoAlpn,
    /// Early data can be replayed by anyone who saw it.
    #[error("the TLS configuration allows early data (0-RTT), which can be replayed")]
    EarlyData,
}

/// TLS of the accepting side. Cheap to clone.
#[derive(Clone)]
pub struct ServerCrypto(pub(crate) Arc<QuicServerConfig>);

impl ServerCrypto {
    /// Checks `config` and makes it fit for QUIC. That clients are asked for certificates is up to its verifier.
    pub fn new(config: Arc<rustls::ServerConfig>) -> Result<Self, TlsError> {
        if config.alpn_protocols.is_empty() {
            return Err(TlsError::NoAlpn);
        }
        if config.max_early_data_size != 0 {
            return Err(TlsError::EarlyData);
        }
        QuicServerConfig::try_from(config)
            .map(|config| Self(Arc::new(config)))
            .map_err(|_| TlsError::NoInitialCipherSuite)
    }
}

impl std::fmt::Debug for ServerCrypto {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerCrypto")
    }
}

/// TLS of the connecting side. Cheap to clone.
#[derive(Clone)]
pub struct ClientCrypto(pub(crate) Arc<QuicClientConfig>);

impl ClientCrypto {
    /// Checks `config` and makes it fit for QUIC.
    pub fn new(config: Arc<rustls::ClientConfig>) -> Result<Self, TlsError> {
        if config.alpn_protocols.is_empty() {
            return Err(TlsError::NoAlpn);
        }
        if config.enable_early_data {
            return Err(TlsError::EarlyData);
        }
        QuicClientConfig::try_from(config)
            .map(|config| Self(Arc::new(config)))
            .map_err(|_| TlsError::NoInitialCipherSuite)
    }
}

impl std::fmt::Debug for ClientCrypto {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientCrypto")
    }
}
