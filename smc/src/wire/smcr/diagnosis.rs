//! Diagnosis codes of a Decline, by the kernel's numbers (`net/smc/smc_clc.h`): `smcss` and `smcr stats` print them.

macro_rules! diagnoses {
    ($($name:ident = $code:literal, $text:literal;)*) => {
        /// Why a peer declined. A number that is not in the table is kept as it came.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct Diagnosis(pub u32);

        impl Diagnosis {
            $(#[doc = $text] pub const $name: Self = Self($code);)*

            /// All that are known.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// In words; a number that is not in the table has none.
            #[must_use]
            pub fn text(self) -> Option<&'static str> {
                match self.0 { $($code => Some($text),)* _ => None }
            }
        }
    };
}

diagnoses! {
    NO_MEMORY = 0x0101_0000, "out of memory";
    TIMEOUT_CONFIRM_LINK = 0x0201_0000, "timeout in CONFIRM LINK";
    TIMEOUT_ADD_LINK = 0x0202_0000, "timeout in ADD LINK";
    CONFIGURATION = 0x0300_0000, "configuration error";
    PEER_NO_SMC = 0x0301_0000, "the peer did not offer SMC";
    IPSEC = 0x0302_0000, "IPsec is in use";
    NO_DEVICE = 0x0303_0000, "no usable device";
    NO_SMCD_DEVICE = 0x0303_0001, "no SMC-D device";
    NO_SMCR_DEVICE = 0x0303_0002, "no SMC-R device";
    NO_ISM_V2 = 0x0303_0003, "ISM version 2 is not supported";
    NO_V2_EXTENSION = 0x0303_0004, "the version 2 extension is missing";
    NO_SMCD_V2_EXTENSION = 0x0303_0005, "the SMC-D version 2 extension is missing";
    NO_SEID = 0x0303_0006, "the peer sent no system EID";
    NO_SMCD_V2_DEVICE = 0x0303_0007, "no SMC-D version 2 device";
    NO_UEID = 0x0303_0008, "the peer sent no user EID";
    RELEASE = 0x0303_0009, "no release in common";
    MAX_CONNS = 0x0303_000a, "no number of connections in common";
    MAX_LINKS = 0x0303_000b, "no number of links in common";
    MODE_MISMATCH = 0x0304_0000, "the SMC modes do not match";
    RMBE_EYECATCHER = 0x0305_0000, "the peer wants eyecatchers in RMBEs";
    SOCKET_OPTION = 0x0306_0000, "a socket option is not supported";
    PREFIX_MISMATCH = 0x0307_0000, "the IP subnets do not match";
    VLAN = 0x0308_0000, "the VLAN could not be found out";
    VLAN_REGISTRATION = 0x0309_0000, "the VLAN could not be registered";
    NO_ACTIVE_LINK = 0x030a_0000, "the link group has no active link";
    NO_SUCH_LINK = 0x030b_0000, "the link that the server named is not known";
    VERSION_MISMATCH = 0x030c_0000, "the versions do not match";
    DMB_LIMIT = 0x030d_0000, "too many SMC-D buffers";
    NO_ROUTE = 0x030e_0000, "no route to the peer's port";
    INDIRECT = 0x030f_0000, "the peer is reached by a gateway and should not be, or the reverse";
    SYNC_ERROR = 0x0400_0000, "the ends disagree about their link group";
    PEER_DECLINED = 0x0500_0000, "the peer declined";
    INTERNAL = 0x0999_0000, "internal error";
    INTERNAL_RTOKEN = 0x0999_0001, "the peer's memory key could not be kept";
    INTERNAL_READY_LINK = 0x0999_0002, "the link could not be made ready";
    INTERNAL_REGISTER = 0x0999_0003, "the receive buffer could not be registered";
}

impl std::fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.text() {
            Some(text) => write!(f, "{text} ({:#010x})", self.0),
            None => write!(f, "{:#010x}", self.0),
        }
    }
}
