//! What a function records and reports of requests that it does not support.

use super::Function;
use crate::pci::capabilities::express::{DeviceControl, Severity};
use crate::pci::command::{Command, Status};
use crate::pci::request::{ErrorMessage, UnsupportedRequest};

impl Function {
    /// Records that a request to the function was completed as an Unsupported Request, as far as
    /// it has registers for that. Returns the error message that the function sends, if it sends
    /// one (PCIe 6.2.5 and figure 6-2).
    ///
    /// In D3hot too (PCIe 5.3.1.4). A conventional function just does not claim the request, and
    /// the initiator's master abort is not its business.
    pub fn record_unsupported_request(
        &mut self,
        request: &UnsupportedRequest,
    ) -> Option<ErrorMessage> {
        let express = self.capabilities.express?;
        let aer = self.capabilities.aer;
        let fatal = aer.is_some_and(|aer| aer.unsupported_request_is_fatal(&self.space));
        let severity = match (fatal, request.kind.is_posted()) {
            (true, _) => Severity::Fatal,
            (false, true) => Severity::NonFatal,
            (false, false) => Severity::Advisory,
        };
        express.record_unsupported_request(&mut self.space, severity);
        let reported = match aer {
            Some(aer) => aer.log(&mut self.space, severity, request.header()),
            // An advisory error has no message without Advanced Error Reporting (PCIe 6.2.3.2.4).
            None => severity != Severity::Advisory,
        };
        if !reported {
            return None;
        }

        let control = express.control(&self.space);
        let unsupported = control.contains(DeviceControl::UNSUPPORTED_REQUEST_REPORTING);
        let (enable, message) = match severity {
            Severity::Advisory => {
                let enable = DeviceControl::CORRECTABLE_ERROR_REPORTING;
                return (unsupported && control.contains(enable))
                    .then_some(ErrorMessage::Correctable);
            }
            Severity::NonFatal => {
                (DeviceControl::NON_FATAL_ERROR_REPORTING, ErrorMessage::NonFatal)
            }
            Severity::Fatal => (DeviceControl::FATAL_ERROR_REPORTING, ErrorMessage::Fatal),
        };
        // SERR# Enable stands in for both reporting enables (PCIe 6.2.5). Only then is the message
        // noted as a system error (PCIe 7.5.1.1.4).
        if self.command().contains(Command::SERR_ENABLE) {
            self.set_status(Status::SIGNALED_SYSTEM_ERROR, true);
            return Some(message);
        }
        (unsupported && control.contains(enable)).then_some(message)
    }
}
