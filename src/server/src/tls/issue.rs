//! Issuing certificates: a cluster's authority, and what it signs.
//!
//! Keys are ECDSA P-256. An authority cannot sign another authority. A certificate never outlives the authority that signed it.
//! Nothing here writes a file.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::identity::{Identity, Role, check_name};

/// How far before its making a certificate begins to be valid, so that a machine whose clock is behind takes it.
const BACKDATED: Duration = Duration::from_hours(1);

/// A certificate and its private key, both PEM.
pub struct Issued {
    /// The certificate; what it says is public.
    pub certificate_pem: String,
    /// The private key (PKCS #8); whoever reads it is the identity.
    pub key_pem: String,
}

/// Why nothing was issued. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// A name cannot be part of an identity.
    #[error(transparent)]
    Name(#[from] super::identity::IdentityError),
    /// A host is neither an address nor a DNS name.
    #[error("`{0}` is neither an IP address nor a DNS name")]
    Host(String),
    /// The authority's certificate cannot be read as one that `generation certs ca` made.
    #[error("the authority's certificate {0}")]
    Authority(&'static str),
    /// The authority's key does not belong to its certificate.
    #[error("the authority's private key does not belong to its certificate")]
    KeyMismatch,
    /// The authority has expired.
    #[error("the authority's certificate has expired; make a new one with `generation certs ca --force`")]
    Expired,
    /// The cryptography library refused.
    #[error("cannot make a certificate: {0}")]
    Library(#[from] rcgen::Error),
}

/// A cluster's certificate authority, able to sign.
pub struct Authority {
    cluster: String,
    certificate_pem: String,
    key_pem: String,
    not_after_unix_s: u64,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes the authority of `cluster`, valid from `now` for `lifetime`.
    pub fn new(cluster: &str, lifetime: Duration, now: SystemTime) -> Result<Self, IssueError> {
        check_name(cluster)?;
        let key = KeyPair::generate()?;
        let not_after_unix_s = unix_s(now).saturating_add(lifetime.as_secs());
        let mut params = CertificateParams::default();
        params.distinguished_name = subject(cluster, &format!("{cluster} authority"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, now, not_after_unix_s);
        let certificate_pem = params.self_signed(&key)?.pem();
        let key_pem = key.serialize_pem();
        Ok(Self {
            cluster: cluster.to_owned(),
            certificate_pem,
            key_pem,
            not_after_unix_s,
            issuer: Issuer::new(params, key),
        })
    }

    /// Reads an authority that [`Authority::new`] made back from its two PEM texts.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, IssueError> {
        let key = KeyPair::from_pem(key_pem)?;
        let (_, pem) = x509_parser::pem::parse_x509_pem(certificate_pem.as_bytes())
            .map_err(|_| IssueError::Authority("is not PEM"))?;
        let (_, certificate) = X509Certificate::from_der(&pem.contents)
            .map_err(|_| IssueError::Authority("is not an X.509 certificate"))?;
        if !certificate.is_ca() {
            return Err(IssueError::Authority("is not that of an authority"));
        }
        if certificate.public_key().subject_public_key.data != key.public_key_raw() {
            return Err(IssueError::KeyMismatch);
        }
        let cluster = certificate
            .subject()
            .iter_organization()
            .next()
            .and_then(|name| name.as_str().ok())
            .ok_or(IssueError::Authority(
                "names no cluster (the organization of its subject)",
            ))?
            .to_owned();
        check_name(&cluster)?;
        let not_after_unix_s = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, key)?;
        Ok(Self {
            cluster,
            certificate_pem: certificate_pem.to_owned(),
            key_pem: key_pem.to_owned(),
            not_after_unix_s,
            issuer,
        })
    }

    /// The cluster whose authority it is.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Whether what it signs is still good at `time`.
    pub fn is_valid_at(&self, time: SystemTime) -> bool {
        unix_s(time) < self.not_after_unix_s
    }

    /// The authority's certificate, PEM: what everybody in the cluster trusts.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The authority's private key, PEM. Only the machine that issues certificates needs it.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Issues a certificate for `role`, valid from `now` for `lifetime` or until the authority ends. `hosts` (IP addresses and
    /// DNS names) are added for TLS clients that insist on them; Generation's own verify the identity instead.
    pub fn issue(
        &self,
        role: Role,
        hosts: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, IssueError> {
        if unix_s(now) >= self.not_after_unix_s {
            return Err(IssueError::Expired);
        }
        let identity = Identity {
            cluster: self.cluster.clone(),
            role,
        };
        // The text is parsed back, so that whatever is issued is also accepted.
        let identity: Identity = identity.to_string().parse()?;
        let mut params = CertificateParams::default();
        let (name, usages) = match &identity.role {
            // A node is a server to clients and a client to the other nodes.
            Role::Node(id) => (
                format!("node {id}"),
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            ),
            Role::Client(name) | Role::Admin(name) => (name.clone(), vec![ExtendedKeyUsagePurpose::ClientAuth]),
        };
        params.distinguished_name = subject(&self.cluster, &name);
        params.extended_key_usages = usages;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        for host in hosts {
            params.subject_alt_names.push(match host.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) if is_dns_name(host) => SanType::DnsName(host.clone().try_into()?),
                Err(_) => return Err(IssueError::Host(host.clone())),
            });
        }
        let not_after = unix_s(now)
            .saturating_add(lifetime.as_secs())
            .min(self.not_after_unix_s);
        set_validity(&mut params, now, not_after);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Issued {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }
}

fn subject(cluster: &str, name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, cluster);
    subject.push(DnType::CommonName, name);
    subject
}

fn set_validity(params: &mut CertificateParams, now: SystemTime, not_after_unix_s: u64) {
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(unix_s(now).saturating_sub(BACKDATED.as_secs()));
    params.not_after = epoch + Duration::from_secs(not_after_unix_s);
}

fn unix_s(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Letters, digits, hyphens and dots in labels of at most 63 (RFC 1123 section 2.1).
fn is_dns_name(name: &str) -> bool {
    name.len() <= 253
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_hours(24);

    fn parse<T>(pem: &str, read: impl FnOnce(&X509Certificate<'_>) -> T) -> T {
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
        let certificate = pem.parse_x509().unwrap();
        read(&certificate)
    }

    fn der(pem: &str) -> Vec<u8> {
        x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap().1.contents
    }

    #[test]
    fn an_authority_read_back_signs_for_its_cluster() {
        let now = SystemTime::now();
        let made = Authority::new("prod", 10 * DAY, now).unwrap();
        let read = Authority::from_pem(made.certificate_pem(), made.key_pem()).unwrap();
        assert_eq!(read.cluster(), "prod");
        for role in [Role::Node(3), Role::Client("web".into()), Role::Admin("ops".into())] {
            let issued = read.issue(role.clone(), &[], DAY, now).unwrap();
            let identity = Identity::from_certificate(&der(&issued.certificate_pem)).unwrap();
            assert_eq!(
                identity,
                Identity {
                    cluster: "prod".into(),
                    role
                }
            );
            let authority = der(made.certificate_pem());
            parse(&issued.certificate_pem, |certificate| {
                let (_, authority) = X509Certificate::from_der(&authority).unwrap();
                certificate.verify_signature(Some(authority.public_key())).unwrap();
                assert!(!certificate.is_ca());
            });
        }
    }

    #[test]
    fn nothing_outlives_its_authority() {
        let now = SystemTime::now();
        let authority = Authority::new("prod", 2 * DAY, now).unwrap();
        let issued = authority.issue(Role::Node(1), &[], 400 * DAY, now).unwrap();
        let end = parse(authority.certificate_pem(), |certificate| {
            certificate.validity().not_after.timestamp()
        });
        parse(&issued.certificate_pem, |certificate| {
            assert_eq!(certificate.validity().not_after.timestamp(), end);
            assert!(certificate.validity().not_before.timestamp() < i64::try_from(unix_s(now)).unwrap());
        });
        let late = authority.issue(Role::Node(1), &[], DAY, now + 3 * DAY);
        assert!(matches!(late, Err(IssueError::Expired)));
    }

    #[test]
    fn a_key_of_another_authority_is_refused() {
        let now = SystemTime::now();
        let (a, b) = (
            Authority::new("prod", DAY, now).unwrap(),
            Authority::new("prod", DAY, now).unwrap(),
        );
        let mixed = Authority::from_pem(a.certificate_pem(), b.key_pem());
        assert!(matches!(mixed, Err(IssueError::KeyMismatch)));
        let leaf = a.issue(Role::Node(1), &[], DAY, now).unwrap();
        let not_an_authority = Authority::from_pem(&leaf.certificate_pem, &leaf.key_pem);
        assert!(matches!(not_an_authority, Err(IssueError::Authority(_))));
    }

    #[test]
    fn hosts_are_checked() {
        let now = SystemTime::now();
        let authority = Authority::new("prod", DAY, now).unwrap();
        let issue = |host: &str| authority.issue(Role::Node(1), &[host.to_owned()], DAY, now);
        for host in ["127.0.0.1", "::1", "localhost", "node-1.example.com"] {
            assert!(issue(host).is_ok(), "{host}");
        }
        for host in ["", "-a", "a b", "a..b", "ä.example", "*.example.com"] {
            assert!(matches!(issue(host), Err(IssueError::Host(_))), "{host}");
        }
        assert!(matches!(
            authority.issue(Role::Client("a/b".into()), &[], DAY, now),
            Err(IssueError::Name(_))
        ));
    }
}
