//! Identities: the URI in a certificate's subject alternative name, `generation://CLUSTER/ROLE/NAME`.
//!
//! The parser is strict, so that two different texts never name the same identity: lower-case scheme, no port, no query, no
//! percent-encoding, no empty part, a node id without leading zeros.

use std::fmt;
use std::str::FromStr;

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The scheme of an identity, with the separator behind it.
const SCHEME: &str = "generation://";
/// Longest name of a cluster, a client or an administrator, in bytes.
const NAME_MAX_BYTES: usize = 64;

/// What the holder of a certificate may be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Role {
    /// A node of the cluster, by its id (from 1).
    Node(u64),
    /// A program that reads and writes data.
    Client(String),
    /// An operator: whatever a client may do, and the commands on the cluster.
    Admin(String),
}

/// Who the holder of a certificate is, in which cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The cluster's name. A certificate is worth nothing in a cluster of another name, even under the same authority.
    pub cluster: String,
    /// What it may be there.
    pub role: Role,
}

/// Why a text or a certificate yields no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The text is not of the form `generation://CLUSTER/ROLE/NAME`.
    #[error("`{0}` is not of the form generation://CLUSTER/node|client|admin/NAME")]
    Form(String),
    /// A cluster, client or administrator name has a character or a length that is not allowed.
    #[error(
        "the name `{0}` must be 1 to 64 characters of a-z, A-Z, 0-9, `-`, `_` and `.`, beginning with a letter or digit"
    )]
    Name(String),
    /// The id of a node is not a number from 1.
    #[error("the node id `{0}` must be a whole number from 1, without leading zeros")]
    NodeId(String),
    /// The bytes are no X.509 certificate.
    #[error("it is not an X.509 certificate")]
    NotACertificate,
    /// The certificate has no URI of the scheme `generation` among its subject alternative names.
    #[error("it carries no generation:// URI in its subject alternative name")]
    Missing,
    /// The certificate names more than one identity, so it would be up to the reader which one counts.
    #[error("it carries more than one generation:// URI in its subject alternative name")]
    Several,
}

/// Whether `name` may name a cluster, a client or an administrator.
pub fn check_name(name: &str) -> Result<(), IdentityError> {
    let well_formed = name.len() <= NAME_MAX_BYTES
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    if well_formed {
        Ok(())
    } else {
        Err(IdentityError::Name(name.to_owned()))
    }
}

impl Identity {
    /// The identity in the subject alternative name of a DER-encoded certificate. The certificate is parsed, not verified: that
    /// is TLS's work and done before.
    pub fn from_certificate(der: &[u8]) -> Result<Self, IdentityError> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|_| IdentityError::NotACertificate)?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|_| IdentityError::NotACertificate)?;
        let mut found = None;
        for name in names.iter().flat_map(|extension| &extension.value.general_names) {
            let GeneralName::URI(uri) = name else { continue };
            if !uri.starts_with(SCHEME) {
                continue;
            }
            if found.replace(uri.parse::<Self>()?).is_some() {
                return Err(IdentityError::Several);
            }
        }
        found.ok_or(IdentityError::Missing)
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Form(text.to_owned());
        let mut parts = text.strip_prefix(SCHEME).ok_or_else(form)?.split('/');
        let (Some(cluster), Some(role), Some(name), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(form());
        };
        check_name(cluster)?;
        let role = match role {
            "node" => {
                let id = name.parse::<u64>().ok().filter(|id| *id > 0 && id.to_string() == name);
                Role::Node(id.ok_or_else(|| IdentityError::NodeId(name.to_owned()))?)
            }
            "client" => check_name(name).map(|()| Role::Client(name.to_owned()))?,
            "admin" => check_name(name).map(|()| Role::Admin(name.to_owned()))?,
            _ => return Err(form()),
        };
        Ok(Self {
            cluster: cluster.to_owned(),
            role,
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/", self.cluster)?;
        match &self.role {
            Role::Node(id) => write!(f, "node/{id}"),
            Role::Client(name) => write!(f, "client/{name}"),
            Role::Admin(name) => write!(f, "admin/{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_the_way_through_its_text() {
        for text in [
            "generation://prod/node/1",
            "generation://a.b-c_d/client/web",
            "generation://x/admin/ops",
        ] {
            assert_eq!(text.parse::<Identity>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn no_two_texts_name_one_identity() {
        for text in [
            "",
            "generation://",
            "Generation://prod/node/1",
            "generation://prod/node/01",
            "generation://prod/node/+1",
            "generation://prod/node/0",
            "generation://prod/node/18446744073709551616",
            "generation://prod/node/1/",
            "generation://prod//node/1",
            "generation://prod:1/node/1",
            "generation:///node/1",
            "generation://prod/node/",
            "generation://prod/client/a b",
            "generation://prod/client/a%20b",
            "generation://prod/client/-a",
            "generation://prod/root/a",
            "generation://prod/client",
            "https://prod/client/a",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text} was taken");
        }
        let long = format!("generation://prod/client/{}", "a".repeat(65));
        assert!(matches!(long.parse::<Identity>(), Err(IdentityError::Name(_))));
    }

    #[test]
    fn bytes_that_are_no_certificate_are_refused() {
        assert_eq!(Identity::from_certificate(&[]), Err(IdentityError::NotACertificate));
        assert_eq!(
            Identity::from_certificate(&[0x30, 0x82, 0xff, 0xff]),
            Err(IdentityError::NotACertificate)
        );
    }
}
