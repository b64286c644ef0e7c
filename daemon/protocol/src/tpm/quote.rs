//! `TPMS_ATTEST` of a quote: the statement about PCRs that a TPM signs.

use super::Malformed;
use super::reader::Reader;

/// `TPM_GENERATED_VALUE`: the prefix by which a restricted key marks statements of its TPM.
const GENERATED: u32 = 0xff54_4347;
/// `TPM_ST_ATTEST_QUOTE`.
const ATTEST_QUOTE: u16 = 0x8018;
/// Longest name, nonce or digest.
const MAX_FIELD: usize = 128;
/// Most banks in a selection.
const MAX_BANKS: u32 = 16;

/// A parsed quote. Its signature is not verified yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Quote<'a> {
    /// The nonce: the qualifying data that the caller gave to `TPM2_Quote`.
    pub extra_data: &'a [u8],
    /// Number of times that the TPM was reset.
    pub reset_count: u32,
    /// Number of times that the TPM was restarted or resumed since its last reset. 0: the machine had a full boot.
    pub restart_count: u32,
    /// `TPML_PCR_SELECTION`, the bytes exactly as signed.
    pub selection: &'a [u8],
    /// Digest of the selected PCRs' values.
    pub digest: &'a [u8],
}

impl<'a> Quote<'a> {
    /// Parses a `TPMS_ATTEST` of a quote completely.
    ///
    /// # Errors
    /// [`Malformed`], also for attestations that are not quotes.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        if reader.u32_be()? != GENERATED {
            return Err(Malformed("no TPM made this quote"));
        }
        if reader.u16_be()? != ATTEST_QUOTE {
            return Err(Malformed("it is another attestation than a quote"));
        }
        reader.sized(MAX_FIELD)?; // qualifiedSigner
        let extra_data = reader.sized(MAX_FIELD)?;
        reader.u64_be()?; // clock
        let reset_count = reader.u32_be()?;
        let restart_count = reader.u32_be()?;
        reader.u8()?; // safe
        reader.u64_be()?; // firmwareVersion
        let from_selection = reader.rest();
        let banks = reader.u32_be()?;
        if banks > MAX_BANKS {
            return Err(Malformed("the quote selects more than 16 banks"));
        }
        for _ in 0..banks {
            reader.u16_be()?;
            let bits = reader.u8()?;
            reader.take(usize::from(bits))?;
        }
        let length = from_selection.len() - reader.rest().len();
        let selection = from_selection.get(..length).unwrap_or_default();
        let digest = reader.sized(MAX_FIELD)?;
        reader.finish()?;
        Ok(Self { extra_data, reset_count, restart_count, selection, digest })
    }

    /// The quote in the form that a TPM signs, for software TPMs.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        let sized = |out: &mut Vec<u8>, field: &[u8]| {
            out.extend_from_slice(&(field.len() as u16).to_be_bytes());
            out.extend_from_slice(field);
        };
        out.extend_from_slice(&GENERATED.to_be_bytes());
        out.extend_from_slice(&ATTEST_QUOTE.to_be_bytes());
        sized(&mut out, &[]);
        sized(&mut out, self.extra_data);
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&self.reset_count.to_be_bytes());
        out.extend_from_slice(&self.restart_count.to_be_bytes());
        out.extend_from_slice(&[1]);
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(self.selection);
        sized(&mut out, self.digest);
        out
    }
}
