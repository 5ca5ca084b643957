"""Methods: parameters, frozen trees and a loss; they open no file, device or checkpoint."""
