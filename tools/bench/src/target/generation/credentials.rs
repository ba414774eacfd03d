//! Who the benchmark is to a cluster, and why a node was not believed: `client.toml` and its certificates.

use std::path::Path;
use std::sync::Arc;

use generation_client::{ClientConfig, Refused};
use generation_quic::ClientCrypto;

use crate::target::TargetError;

/// The cluster as its `client.toml` describes it, read and checked.
pub(super) struct Credentials {
    /// Addresses of nodes, one of which must answer.
    pub(super) seeds: Vec<String>,
    /// What connections are opened with.
    pub(super) crypto: ClientCrypto,
    /// Why a node's certificate was refused.
    refused: Refused,
}

impl Credentials {
    pub(super) fn read(config: &Path) -> Result<Self, TargetError> {
        let unusable = |message: String| TargetError::Certificate {
            path: config.display().to_string(),
            message,
        };
        let client = ClientConfig::load(config).map_err(|error| TargetError::Settings(error.to_string()))?;
        let (tls, refused) = client.tls().map_err(|error| unusable(error.to_string()))?;
        let crypto = ClientCrypto::new(Arc::new(tls)).map_err(|error| unusable(error.to_string()))?;
        Ok(Self {
            seeds: client.seeds,
            crypto,
            refused,
        })
    }

    /// Puts the verifier's reason in the place of TLS's alert number.
    pub(super) fn explain(&self, error: TargetError) -> TargetError {
        let reason = self.refused.lock().ok().and_then(|mut reason| reason.take());
        match (error, reason) {
            (TargetError::Tls { name, addr, .. }, Some(reason)) => TargetError::Tls {
                name,
                addr,
                message: format!("the node's certificate was refused: {reason}"),
            },
            (error, _) => error,
        }
    }
}
